"""How near two results are, and how well one shows its caption. Frames are `[F, H, W, 3]` in [0, 1]."""

import numpy as np
import torch

from dit_accel.errors import ToyError
from dit_accel.scenes import parse, score

Frames = np.ndarray | torch.Tensor


def psnr(frames: Frames, reference: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all frames together (peak 1); infinite for equal inputs."""
    frames, reference = _pair(frames, reference)
    error = (frames - reference).square().mean().item()
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(frames: Frames, reference: Frames) -> float:
    """Mean structural similarity of the frames.

    **Source** Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861 : Gaussian window of 11 pixels,
    sigma 1.5, K1 0.01, K2 0.03, per channel, over the places where the whole window fits.
    """
    frames, reference = (x.movedim(-1, 1) for x in _pair(frames, reference))  # [F, 3, H, W]
    if min(frames.shape[-2:]) < 11:
        raise ValueError(
            f"ssim needs frames of at least 11 x 11 pixels, found {tuple(frames.shape[-2:])}; use psnr"
        )
    place = torch.arange(11, dtype=frames.dtype) - 5
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()
    window = (line[:, None] * line[None]).expand(3, 1, 11, 11)

    def blur(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window, groups=3)

    mean_a, mean_b = blur(frames), blur(reference)
    var_a = blur(frames.square()) - mean_a.square()
    var_b = blur(reference.square()) - mean_b.square()
    shared = blur(frames * reference) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a.square() + mean_b.square() + 0.01**2)
    structure = (2 * shared + 0.03**2) / (var_a + var_b + 0.03**2)
    return (light * structure).mean().item()


def faithfulness(frames: Frames, caption: str) -> float | None:
    """Share of the caption's attributes (colours, shapes, motions, ground, texture) that are seen, in [0, 1].

    None for a caption outside the toys' language: nothing is known about what a real prompt should look like.
    """
    try:
        scene = parse(caption)
    except ToyError:
        return None
    return score(_tensor(frames).numpy(), scene)


def _pair(frames: Frames, reference: Frames) -> tuple[torch.Tensor, torch.Tensor]:
    frames, reference = _tensor(frames), _tensor(reference)
    if frames.shape != reference.shape:
        raise ValueError(
            f"frames of shape {tuple(frames.shape)} and a reference of {tuple(reference.shape)} were given; "
            "compare results of the same size and frame count"
        )
    return frames, reference


def _tensor(frames: Frames) -> torch.Tensor:
    frames = torch.as_tensor(frames).detach().cpu()
    if frames.dtype == torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames of dtype {frames.dtype} and shape {tuple(frames.shape)} were given; "
            "pass floats in [0, 1] of shape [F, H, W, 3] (F = 1 for a picture)"
        )
    return frames.float()
