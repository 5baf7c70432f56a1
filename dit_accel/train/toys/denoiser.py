"""Flow matching on cached latents: x_sigma = (1 - sigma) x0 + sigma noise; predicted is noise - x0.

Three things make it affordable on a CPU, and none of them changes what the pipeline computes:
- `toys/wan` first sees a few of a clip's latent frames at a time, at their true times (`FrameWindow`);
- `toys/wan`'s 512 text keys are the real words and ONE zero key that counts for all padding (`PaddingKey`);
- pictures are first seen whole at a quarter of the area: `toys/pixart`'s position table stretches to fit,
  `toys/qwen_image`'s tokens keep the places they have in the whole (`SpreadPlaces`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.toys.latents import Batch, Pool
from dit_accel.train.toys.models import SHIFT, Denoiser, build_denoiser, timesteps_of
from dit_accel.train.toys.naming import Naming
from dit_accel.train.toys.shortcuts import FrameWindow, PaddingKey, SpreadPlaces
from dit_accel.train.toys.text import Prompts

DROP_TEXT = 0.1


def sample_sigma(count: int, shift: float) -> torch.Tensor:
    """Noise levels `[B]`: stratified uniform, then the schedule's shift."""
    uniform = (torch.arange(count) + torch.rand(count)) / count
    return shift * uniform / (1 + (shift - 1) * uniform)


class Task:
    """The loss of one toy's denoiser on a batch of latents and captions."""

    def __init__(self, toy: str, denoiser: Denoiser):
        self.toy = toy
        self.prompts = Prompts(toy, denoiser.text_encoder)
        self.naming = Naming(denoiser)
        if toy == "wan":
            self.padding = PaddingKey(denoiser.transformer)
            self.places = FrameWindow(denoiser.transformer)
        elif toy == "qwen_image":
            self.places = SpreadPlaces(denoiser.transformer)

    def loss(
        self, denoiser: Denoiser, batch: Batch, plan: "Stage", frames: list[int] | None = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted mean square error of the velocity; `frames` keeps some of the latent frames."""
        captions = [caption if torch.rand(()) > DROP_TEXT else "" for caption in batch.captions]
        batch = batch.keep(frames)
        sigma = sample_sigma(len(captions), plan.shift)
        noise = torch.randn_like(batch.latents)
        # drawn on the CPU: the same numbers whatever the device
        device = next(denoiser.parameters()).device
        batch, sigma, noise = batch.to(device), sigma.to(device), noise.to(device)
        level = sigma.view(-1, *[1] * (batch.latents.ndim - 1))
        noisy = (1 - level) * batch.latents + level * noise
        velocity = self.predict(denoiser, noisy, sigma, captions, frames)
        error = (velocity.float() - (noise - batch.latents)).square()
        weight = 1 + plan.things * (1 - level) * batch.things.sum(1, keepdim=True).clamp(max=1)
        weighted = (weight * error).mean() / weight.mean()
        error = error.flatten(1).mean(1)
        noisiest = error[-max(1, len(error) // 4) :].mean().item()
        numbers = {"loss": error.mean().item(), "weighted": weighted.item(), "noisiest": noisiest}
        if not plan.naming:
            return weighted, numbers
        unnamed = self.naming.loss(denoiser, batch.things, captions)
        return weighted + plan.naming * unnamed, numbers | {"unnamed": unnamed.item()}

    def predict(
        self,
        denoiser: Denoiser,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        captions: list[str],
        frames: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The predicted velocity, of the shape of `noisy`."""
        text, mask = self.prompts(captions)
        timesteps = timesteps_of(self.toy, sigma)
        if self.toy == "wan":
            text = torch.cat(
                [text * mask[..., None].to(text.dtype), text.new_zeros(len(text), 1, text.shape[2])], dim=1
            )
            self.padding.set(mask.sum(1), mask.shape[1])
            self.places.frames = frames
            output = denoiser.transformer(noisy, timesteps, text, return_dict=False)[0]
            self.padding.mask = self.places.frames = None
            return output
        if self.toy == "qwen_image":
            return self._predict_packed(denoiser.transformer, noisy, timesteps, text, mask)
        return denoiser.transformer(
            noisy,
            text,
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def _predict_packed(
        self,
        transformer: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """QwenImagePipeline makes a token of each two by two latents before the transformer sees them."""
        packed = functional.pixel_unshuffle(noisy, 2)  # [B, 4 C, Y / 2, X / 2]
        output = transformer(
            hidden_states=packed.flatten(2).transpose(1, 2),
            timestep=timesteps,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, *packed.shape[2:])]] * len(packed),
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, packed.shape[2:]), 2)


@dataclass(frozen=True)
class Stage:
    """A stage sees `batch` samples a step from pools `pool-*`, and of videos `window` latent frames."""

    pool: str
    batch: int
    window: int = 0
    stride: int = 1
    shift: float = (
        3.0  # of the noise levels trained on; above the sampler's it dwells where shapes are decided
    )
    # extra weight of covered latents, falling to none at pure noise: where things will be is not known there,
    # and a weight that tells would draw them too large
    things: float = 0.0
    naming: float = 0.0  # weight of the loss of `Naming`
    beside: tuple[str, int] | None = None  # a second pool and its batch, taken every other time

    def frames(self, number: int, total: int) -> list[int] | None:
        """The frames of batch `number`: random, in order, one time in four with both ends of the clip."""
        if not self.window or self.window >= total:
            return None
        rng = np.random.default_rng([number, self.window])
        if self.window > 1 and rng.random() < 0.25:
            inner = rng.choice(np.arange(1, total - 1), self.window - 2, replace=False)
            return sorted([0, total - 1, *map(int, inner)])
        return sorted(map(int, rng.choice(total, self.window, replace=False)))


STAGES = {
    "wan": {
        "frame": Stage("video64", 32, 1),
        "pair": Stage("video64", 12, 2),
        "few": Stage("video64", 6, 4),
        "small": Stage("video32", 12, stride=2, things=6.0, naming=0.1),
        "full": Stage("video64", 4, things=4.0, naming=0.1),
    },
    "pixart": {
        "small": Stage("image128", 32, things=6.0, naming=0.1),
        "full": Stage("image256", 8, things=4.0, naming=0.1),
        "mixed": Stage("image256", 8, things=6.0, naming=0.1, beside=("image128", 32)),
    },
    "qwen_image": {
        "small": Stage("qwen64", 32, stride=2, shift=3.0, things=6.0, naming=0.1),
        "full": Stage("qwen128", 8, shift=SHIFT["qwen_image"], things=4.0, naming=0.1),
    },
}


def load_start(denoiser: Denoiser, start: Path) -> None:
    """The weights of an earlier stage's folder, or of an exported pipeline (fp16, the moving average)."""
    if (start / "weights.safetensors").exists():
        denoiser.load_state_dict(load_file(start / "weights.safetensors"), strict=False)
        return
    pipe = DiffusionPipeline.from_pretrained(start)
    denoiser.transformer.load_state_dict(pipe.transformer.state_dict())
    denoiser.text_encoder.load_state_dict(pipe.text_encoder.state_dict())


def train_denoiser(
    toy: str, stage: str, pools: Path, config: LoopConfig, start: Path | None = None
) -> Denoiser:
    """Trains one stage, from the weights (not the average) of an earlier stage in the folder `start`."""
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(toy)
    if start is not None:
        load_start(denoiser, start)
    # as with real pipelines: trained along at these rates, its attention saturates and forgets how to read
    denoiser.text_encoder.requires_grad_(False)
    plan, task = STAGES[toy][stage], Task(toy, denoiser)
    if plan.stride > 1:
        task.places.stride = plan.stride
    sources = [(plan.pool, plan.batch), *([plan.beside] if plan.beside else [])]
    opened = [
        (Pool(list(pools.glob(f"{name}-*.safetensors")), config.seed), batch) for name, batch in sources
    ]

    # at a few hundred tokens plain matrix products in bf16 beat the CPU's fused attention
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    attention = SDPBackend.MATH if stage != "full" else SDPBackend.FLASH_ATTENTION

    def loss_of(module: nn.Module, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        pool, batch = opened[number % len(opened)]
        drawn = pool.batch(number // len(opened), batch)
        frames = plan.frames(number, drawn.latents.shape[2]) if toy == "wan" else None
        return task.loss(module, drawn, plan, frames)

    with sdpa_kernel([attention, SDPBackend.MATH], set_priority=True):
        train(denoiser, loss_of, config)
    return denoiser
