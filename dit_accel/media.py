"""Frames to files: mp4, gif and png, on disk or in memory.

A video saved as .png becomes a strip of up to eight frames, evenly spaced, from left to right.
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np

from dit_accel.errors import BadUsage

SUFFIXES = {"video": (".mp4", ".gif", ".png"), "image": (".png",)}
STRIP = 8  # frames of a video's strip
CLEAR = 256  # pixels: smaller videos are enlarged for a page, as 4:2:0 colour would smear their pixels


def check_suffix(path: Path, output: str | None) -> None:
    """Refuse a file name that cannot hold such an output, before any work."""
    known = SUFFIXES[output or "video"]
    if path.suffix.lower() not in known:
        kind = "a video" if output == "video" else "an image" if output == "image" else "the output"
        raise BadUsage(
            f'asked to save {kind} as "{path.name}"; '
            f"it can be saved as {', '.join(known)}. Change the ending of --out."
        )


def save(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames [F, H, W, 3] in [0, 1]; the ending decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        path.write_bytes(mp4(frames, fps))
    elif suffix == ".gif":
        pixels = to_bytes(frames)
        iio.imwrite(path, pixels, extension=".gif", duration=1000 / fps, loop=0, plugin="pillow")
    else:
        path.write_bytes(png(strip(frames)))


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """8-bit pixels of frames in [0, 1]."""
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def strip(frames: np.ndarray) -> np.ndarray:
    """One picture [H, W, 3]: the frames side by side, at most STRIP of them."""
    chosen = np.linspace(0, len(frames) - 1, min(STRIP, len(frames))).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def png(picture: np.ndarray) -> bytes:
    """A picture [H, W, 3] in [0, 1] as a PNG file."""
    return iio.imwrite("<bytes>", to_bytes(picture), extension=".png")


def mp4(frames: np.ndarray, fps: int, enlarge: bool = False) -> bytes:
    """Frames [F, H, W, 3] in [0, 1] as an H.264 file that every browser plays."""
    pixels = to_bytes(frames)
    if enlarge:
        factor = max(1, -(-CLEAR // max(pixels.shape[1:3])))
        pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = pixels.shape[1:3]
    # 4:2:0 colour needs even sides; a repeated edge shows less than a resize
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return iio.imwrite(
        "<bytes>",
        pixels,
        extension=".mp4",
        plugin="FFMPEG",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        macro_block_size=1,
        quality=None,
        output_params=["-crf", "12", "-movflags", "+faststart"],
    )
