"""Pools of latents of training scenes: encoded once, on disk in half precision, with their captions."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit_accel.scenes import render
from dit_accel.train.toys.data import training_scene


def normalise(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's transformer sees them: zero mean and unit scale (per channel for Wan)."""
    if isinstance(vae, AutoencoderKLWan):
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
    """Renders and encodes `count` training scenes: latents `[count, C, (F,) Y, X]`, captions as metadata."""
    rng = np.random.default_rng([seed, size, frames])
    captions, parts = [], []
    for start in range(0, count, batch):
        drawn = [training_scene(rng, moving=frames > 1) for _ in range(min(batch, count - start))]
        pixels = torch.from_numpy(
            np.stack([render(scene, number, frames, size, size) for scene, number in drawn])
        )
        pixels = pixels.movedim(-1, 1).mul(2).sub(1)  # [B, 3, F, H, W]
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixels if frames > 1 else pixels[:, :, 0]).latent_dist.mode()
        parts.append(normalise(vae, latents.float()).half())
        captions += [str(scene) for scene, _ in drawn]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.cat(parts).contiguous()}, file, {"captions": json.dumps(captions)})


class Pool:
    """Pool files opened together; batches are drawn by number, so that a resumed run draws the same ones."""

    def __init__(self, files: list[Path], seed: int):
        self.seed, self.latents, self.captions = seed, [], []
        for file in sorted(files):
            with safe_open(file, "pt") as opened:
                self.latents.append(opened.get_tensor("latents"))
                self.captions += json.loads(opened.metadata()["captions"])
        self.latents = torch.cat(self.latents)

    def batch(self, number: int, size: int) -> tuple[torch.Tensor, list[str]]:
        """Batch `number` of an endless walk: each epoch is a new permutation of the pool."""
        per_epoch = max(1, math.floor(len(self.captions) / size))
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.captions))
        chosen = order[place * size : (place + 1) * size]
        return self.latents[torch.from_numpy(chosen)].float(), [self.captions[index] for index in chosen]
