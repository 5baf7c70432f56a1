"""Scene and seed to pixels: anti-aliased, at any size and frame count. Lengths are in shorter sides."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit_accel.scenes.caption import BACKGROUNDS, COLOURS, DIRECTIONS, Scene

TRAVEL = 0.42  # how far a moving thing goes, in shorter sides
PERIOD = 0.25  # of stripes and checks
CONTRAST = 22.0  # added to and taken from the background's 8-bit colour by its texture
EDGE = 1.4  # width of the anti-aliased edge, in pixels
RADIUS = {"video": (0.13, 0.18), "image": (0.15, 0.21)}


@dataclass(frozen=True)
class Layout:
    """What the caption leaves open: radii `[K]`, starts `[K, 2]` (row, column), texture phase `[2]`."""

    radius: np.ndarray
    start: np.ndarray
    phase: np.ndarray


def render(scene: Scene, seed: int, frames: int = 1, height: int = 64, width: int = 64) -> np.ndarray:
    """Draws `scene` as float32 `[F, H, W, 3]` in [0, 1]; the same clip at every size."""
    layout = lay_out(scene, seed, _aspect(height, width))
    y, x = _grid(height, width)
    clip = np.broadcast_to(_ground(scene, layout.phase, y, x), (frames, height, width, 3)).copy()
    for thing, cover in zip(scene.things, _covers(scene, layout, frames, height, width), strict=True):
        clip += cover[..., None] * (np.asarray(COLOURS[thing.colour], np.float32) / 255 - clip)
    return clip


def cover(scene: Scene, seed: int, frames: int = 1, height: int = 64, width: int = 64) -> np.ndarray:
    """How much of each pixel of `render`'s clip each of K things covers: `[K, F, H, W]` in [0, 1]."""
    layout = lay_out(scene, seed, _aspect(height, width))
    return np.stack(list(_covers(scene, layout, frames, height, width))).astype(np.float32)


def _aspect(height: int, width: int) -> tuple[float, float]:
    return height / min(height, width), width / min(height, width)


def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    y = ((np.arange(height, dtype=np.float32) + 0.5) / min(height, width))[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5) / min(height, width))[None, :]
    return y, x


def _covers(scene: Scene, layout: Layout, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Each thing's cover `[F, H, W]`, in the caption's order: later things lie on top."""
    y, x = _grid(height, width)
    edge = EDGE / min(height, width)
    paths = _paths(scene, layout.start, frames)  # [K, F, 2]
    for thing, radius, path in zip(scene.things, layout.radius, paths, strict=True):
        row, column = path[:, 0, None, None], path[:, 1, None, None]
        yield np.clip(0.5 - distance(thing.shape, y - row, x - column, radius) / edge, 0, 1)


def lay_out(scene: Scene, seed: int, aspect: tuple[float, float]) -> Layout:
    """Random places where nothing leaves the frame and, where one of 48 tries finds it, nothing overlaps."""
    rng = np.random.default_rng([seed, zlib.crc32(str(scene).encode())])
    moving = any(thing.motion for thing in scene.things)
    low, high = RADIUS["video" if moving else "image"]
    count = len(scene.things)
    radius = rng.uniform(low, high, count)
    phase = rng.uniform(0, PERIOD, 2)
    travel = _travel(scene)  # [K, 2]
    margin = radius[:, None] * 1.05
    lowest = margin + np.maximum(-travel, 0)  # [K, 2]
    highest = np.asarray(aspect) - margin - np.maximum(travel, 0)
    tries = rng.uniform(lowest, highest, (48, count, 2))
    if count == 1:
        return Layout(radius, tries[0], phase)
    gaps = np.array([_gap(_paths(scene, start, 17), radius) for start in tries])
    fits = np.flatnonzero(gaps > 0.02)
    return Layout(radius, tries[fits[0] if len(fits) else gaps.argmax()], phase)


def _gap(paths: np.ndarray, radius: np.ndarray) -> float:
    apart = np.linalg.norm(paths[0] - paths[1], axis=-1).min()
    # the corners of squares and triangles reach beyond the radius
    return apart - 1.1 * radius.sum()


def _travel(scene: Scene) -> np.ndarray:
    return np.asarray([way_of(thing.motion) for thing in scene.things], np.float32) * TRAVEL


def _paths(scene: Scene, start: np.ndarray, frames: int) -> np.ndarray:
    progress = np.stack([progress_of(thing.motion, frames) for thing in scene.things])  # [K, F]
    return (start[:, None] + progress[..., None] * _travel(scene)[:, None]).astype(np.float32)  # [K, F, 2]


def way_of(motion: str | None) -> tuple[int, int]:
    """Where a motion leads: (rows, columns), each -1, 0 or 1."""
    return DIRECTIONS.get((motion or "still").split()[-1], (0, 0))


def progress_of(motion: str | None, frames: int) -> np.ndarray:
    """The share of the way done, `[F]`: `moving` is even; `darting` crosses in its middle 3/10."""
    time = np.linspace(0, 1, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)
    return np.clip((time - 0.35) / 0.3, 0, 1) if (motion or "").startswith("darting") else time


def distance(shape: str, dy: np.ndarray, dx: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (negative inside) to a shape of about `radius` around the origin; areas are similar."""
    if shape == "square":
        return np.maximum(np.abs(dy), np.abs(dx)) - 0.88 * radius
    if shape == "triangle":
        # equilateral, point up, its centroid at the origin: three half planes, 0.62 radius away
        side = np.maximum(0.866 * np.abs(dx) - 0.5 * dy, dy)
        return side - 0.62 * radius
    away = np.hypot(dy, dx)
    if shape == "ring":
        return np.abs(away - 0.74 * radius) - 0.26 * radius
    return away - radius


def _ground(scene: Scene, phase: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    base = np.asarray(BACKGROUNDS[scene.background], np.float32)
    return np.clip(base + CONTRAST * wave(scene.texture, phase, y, x)[..., None], 0, 255) / 255


def wave(texture: str, phase: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The texture as a field `[H, W]` within [-1, 1]: steep sines, so that edges are soft but clear."""
    turn = 2 * np.pi / PERIOD
    across = np.clip(2.0 * np.sin(turn * (x - phase[1])) + 0 * y, -1, 1)
    if texture == "striped":
        return across.astype(np.float32)
    if texture == "checked":
        return (across * np.clip(2.0 * np.sin(turn * (y - phase[0])), -1, 1)).astype(np.float32)
    return np.zeros(np.broadcast_shapes(y.shape, x.shape), np.float32)
