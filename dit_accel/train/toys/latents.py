"""Pools of latents of training scenes: encoded once, on disk in half precision, with their captions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit_accel.scenes import MOST_THINGS, Scene, cover, render
from dit_accel.train.toys.data import training_scene
from dit_accel.train.toys.vae import takes_frames

POOLS = {"wan": "video", "pixart": "image", "qwen_image": "qwen"}  # a pool's name: one of these and the size


def normalise(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's transformer sees them: of unit scale, Wan's and Qwen-Image's by channel."""
    if takes_frames(vae):
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std
    return latents * vae.config.scaling_factor


@torch.no_grad()
def encode_pool(
    vae: nn.Module, file: Path, count: int, seed: int, size: int, frames: int = 1, batch: int = 4
) -> None:
    """Renders and encodes `count` training scenes: latents `[count, C, (F,) Y, X]`, captions as metadata.

    Beside them `things` `[count, 2, (F,) Y, X]`: the share of each latent's pixels that each thing covers.
    """
    rng = np.random.default_rng([seed, size, frames])
    captions, parts, things = [], [], []
    for start in range(0, count, batch):
        drawn = [training_scene(rng, moving=frames > 1) for _ in range(min(batch, count - start))]
        pixels = torch.from_numpy(
            np.stack([render(scene, number, frames, size, size) for scene, number in drawn])
        )
        pixels = pixels.movedim(-1, 1).mul(2).sub(1)  # [B, 3, F, H, W]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixels if takes_frames(vae) else pixels[:, :, 0]).latent_dist.mode()
        latents = normalise(vae, latents.float()).half()
        parts.append(latents if frames > 1 or not takes_frames(vae) else latents[:, :, 0])
        things.append(cover_latents(drawn, frames, size, parts[-1].shape))
        captions += [str(scene) for scene, _ in drawn]
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": torch.cat(parts).contiguous(), "things": torch.cat(things).contiguous()}
    save_file(tensors, file, {"captions": json.dumps(captions)})


def cover_latents(drawn: list[tuple[Scene, int]], frames: int, size: int, shape: torch.Size) -> torch.Tensor:
    """Share `[B, 2, (F,) Y, X]` that each thing covers of latents of `shape`; a lone thing's second is 0.

    Latent frame 0 holds frame 0 only, the others four frames each.
    """
    shares = torch.zeros(len(drawn), MOST_THINGS, frames, *shape[-2:])
    for row, (scene, number) in enumerate(drawn):
        covers = torch.from_numpy(cover(scene, number, frames, size, size))  # [K, F, H, W]
        shares[row, : len(covers)] = nn.functional.adaptive_avg_pool2d(covers, shape[-2:])
    if frames == 1:
        return shares[:, :, 0].half()
    rest = shares[:, :, 1:].unflatten(2, (shape[2] - 1, -1)).mean(3)
    return torch.cat([shares[:, :, :1], rest], dim=2).half()


@dataclass(frozen=True)
class Batch:
    """`latents` `[B, C, (F,) Y, X]`, normalised; `things` `[B, 2, (F,) Y, X]` in [0, 1]; B captions."""

    latents: torch.Tensor
    things: torch.Tensor
    captions: list[str]

    def keep(self, frames: list[int] | None) -> "Batch":
        """The same clips with only these latent frames."""
        if frames is None:
            return self
        return Batch(self.latents[:, :, frames], self.things[:, :, frames], self.captions)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(self.latents.to(device), self.things.to(device), self.captions)


class Pool:
    """Pool files opened together; batches are drawn by number, so that a resumed run draws the same ones."""

    def __init__(self, files: list[Path], seed: int):
        self.seed, self.captions = seed, []
        latents, things = [], []
        for file in sorted(files):
            with safe_open(file, "pt") as opened:
                latents.append(opened.get_tensor("latents"))
                things.append(opened.get_tensor("things"))
                self.captions += json.loads(opened.metadata()["captions"])
        self.latents, self.things = torch.cat(latents), torch.cat(things)

    def batch(self, number: int, size: int) -> Batch:
        """Batch `number` of an endless walk: each epoch is a new permutation of the pool."""
        per_epoch = max(1, math.floor(len(self.captions) / size))
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.captions))
        chosen = order[place * size : (place + 1) * size]
        index = torch.from_numpy(chosen)
        captions = [self.captions[place] for place in chosen]
        return Batch(self.latents[index].float(), self.things[index].float(), captions)
