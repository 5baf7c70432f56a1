"""Pixels to attributes: what a clip shows, against what a caption says.

Nothing here reads a seed or a layout. A thing is where its colour is; its shape is the one of four templates
of the same area and centre that covers it best; its motion is the one of nine paths that its centre follows
most closely.
"""

import numpy as np

from dit_accel.scenes.caption import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene
from dit_accel.scenes.render import CONTRAST, PERIOD, TRAVEL, distance, progress_of, way_of

NEAR = 92 / 255  # a pixel has a colour when it is nearer than this to it
SMALLEST = 0.012  # share of the picture a colour must cover to be there; the smallest thing covers 0.033
FAINTEST = 0.4 * CONTRAST / 255  # amplitude below which a ground counts as plain
GRID = 64  # pictures are averaged down to about this before anything is measured
PALETTE = np.array([*COLOURS.values()], np.float32) / 255
GROUNDS = np.array([*BACKGROUNDS.values()], np.float32) / 255


def score(frames: np.ndarray, scene: Scene) -> float:
    """Share of the caption's attributes that `frames` `[F, H, W, 3]` in [0, 1] show."""
    found = attributes(frames)
    hits = [found["background"] == scene.background, found["texture"] == scene.texture]
    hits.append(len(found["things"]) == len(scene.things))
    for thing in scene.things:
        seen = found["things"].get(thing.colour)
        hits += [seen is not None, seen is not None and seen["shape"] == thing.shape]
        if thing.motion is not None:
            # pace and direction count separately: "darting left" for "moving left" is half right
            motion = (seen or {}).get("motion") or "none"
            hits += [
                motion.split()[0] == thing.motion.split()[0],
                motion.split()[-1] == thing.motion.split()[-1],
            ]
    return float(np.mean(hits))


def attributes(frames: np.ndarray) -> dict:
    """What is seen: `background`, `texture`, `things` by colour with `shape` and, of clips, `motion`."""
    frames = _shrink(np.asarray(frames, np.float32))
    nearest = _labels(frames)  # [F, Y, X]: index into COLOURS, or -1 for ground
    ground = _ground_colour(frames, nearest)
    found = {"background": _name_ground(ground), "texture": _texture(frames, nearest), "things": {}}
    for index, colour in enumerate(COLOURS):
        share = (nearest == index).mean(axis=(1, 2))  # [F]
        if np.median(share) < SMALLEST:
            continue
        cover = _cover(frames, nearest, index, ground)
        centres = _centres(cover)
        found["things"][colour] = {"shape": _shape(cover, centres, share)}
        if len(frames) > 1:
            found["things"][colour]["motion"] = _motion(centres, share)
    return found


def _shrink(frames: np.ndarray) -> np.ndarray:
    factor = max(1, min(frames.shape[1:3]) // GRID)
    height, width = frames.shape[1] // factor, frames.shape[2] // factor
    cut = frames[:, : height * factor, : width * factor]
    return cut.reshape(len(frames), height, factor, width, factor, 3).mean(axis=(2, 4))


def _labels(frames: np.ndarray) -> np.ndarray:
    apart = np.linalg.norm(frames[..., None, :] - PALETTE, axis=-1)  # [F, Y, X, colours]
    return np.where(apart.min(-1) < NEAR, apart.argmin(-1), -1)


def _is_ground(frames: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    # the brightest ground, maroon with its texture, reaches 114 of 255; mixed edge pixels are mostly brighter
    return (nearest < 0) & (frames.max(-1) < 124 / 255)


def _ground_colour(frames: np.ndarray, nearest: np.ndarray) -> np.ndarray:
    mask = _is_ground(frames, nearest)
    return frames[mask].mean(0) if mask.any() else np.zeros(3, np.float32)


def _name_ground(colour: np.ndarray) -> str:
    return list(BACKGROUNDS)[int(np.linalg.norm(GROUNDS - colour, axis=-1).argmin())]


def _texture(frames: np.ndarray, nearest: np.ndarray) -> str:
    """Fits waves of the known period to the ground's brightness, averaged over the frames that show it."""
    mask = _is_ground(frames, nearest)
    weight = mask.mean(0)  # [Y, X]
    bright = (frames.mean(-1) * mask).sum(0) / np.maximum(mask.sum(0), 1)
    seen = weight > 0.2
    if seen.sum() < 64:
        return "plain"
    values = bright[seen] - bright[seen].mean()
    y, x = (axis[seen] for axis in _axes(*bright.shape))
    turn = 2 * np.pi / PERIOD
    across = np.stack([np.sin(turn * x), np.cos(turn * x)])
    down = np.stack([np.sin(turn * y), np.cos(turn * y)])
    fits = {"striped": across, "checked": (across[:, None] * down[None]).reshape(4, -1)}
    # root mean square of the fitted wave, times sqrt 2 (stripes) or 2 (checks): its amplitude
    power = {
        name: np.sqrt(np.mean((basis.T @ np.linalg.lstsq(basis.T, values, rcond=None)[0]) ** 2))
        for name, basis in fits.items()
    }
    amplitude = {"striped": power["striped"] * 2**0.5, "checked": power["checked"] * 2}
    best = max(power, key=power.__getitem__)
    return best if amplitude[best] > FAINTEST else "plain"


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    scale = min(height, width)
    return np.meshgrid((np.arange(height) + 0.5) / scale, (np.arange(width) + 0.5) / scale, indexing="ij")


def _cover(frames: np.ndarray, nearest: np.ndarray, index: int, ground: np.ndarray) -> np.ndarray:
    """How much of each pixel is the thing, `[F, Y, X]`: its place between both colours."""
    line = PALETTE[index] - ground
    share = np.clip((frames - ground) @ line / (line @ line), 0, 1)
    off_line = np.linalg.norm(frames - ground - share[..., None] * line, axis=-1)
    share[(nearest >= 0) & (nearest != index) | (off_line > 0.25)] = 0
    share[share < 0.3] = 0
    return share


def _centres(cover: np.ndarray) -> np.ndarray:
    """Centres of mass `[F, 2]` in shorter sides; the middle of the picture where there is nothing."""
    y, x = _axes(*cover.shape[1:])
    mass = np.maximum(cover.sum(axis=(1, 2)), 1e-6)
    return np.stack([(cover * y).sum(axis=(1, 2)) / mass, (cover * x).sum(axis=(1, 2)) / mass], axis=1)


def _shape(cover: np.ndarray, centres: np.ndarray, share: np.ndarray) -> str:
    """The template of largest soft overlap, over at most nine frames that show most of the thing."""
    clear = np.flatnonzero(share >= 0.7 * share.max())
    clear = clear[np.linspace(0, len(clear) - 1, min(9, len(clear))).astype(int)]
    y, x = _axes(*cover.shape[1:])
    edge = 1.4 / min(cover.shape[1:])
    overlap = dict.fromkeys(SHAPES, 0.0)
    for frame in clear:
        area = cover[frame].sum() / min(cover.shape[1:]) ** 2
        dy, dx = y - centres[frame, 0], x - centres[frame, 1]
        for shape in SHAPES:
            radius = np.sqrt(area / UNIT_AREA[shape])
            template = np.clip(0.5 - distance(shape, dy, dx, radius) / edge, 0, 1)
            overlap[shape] += (
                np.minimum(template, cover[frame]).sum() / np.maximum(template, cover[frame]).sum()
            )
    return max(overlap, key=overlap.__getitem__)


def _unit_area(shape: str) -> float:
    y, x = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    return float((distance(shape, y, x, 1.0) < 0).mean() * 9)


UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}


def _motion(centres: np.ndarray, share: np.ndarray) -> str:
    """The motion whose path, shifted to fit, is nearest to the track (without frames where it is hidden)."""
    use = share > 0.5 * np.median(share)
    track = centres[use] - centres[use].mean(0)
    error = {}
    for motion in MOTIONS:
        path = progress_of(motion, len(centres))[use, None] * np.asarray(way_of(motion)) * TRAVEL
        error[motion] = np.square(track - path + path.mean(0)).sum()
    return min(error, key=error.__getitem__)
