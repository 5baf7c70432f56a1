"""Flow matching on cached latents: x_sigma = (1 - sigma) x0 + sigma noise; predicted is noise - x0.

Three things make it affordable on a CPU, and none of them changes what the pipeline computes:
- `toys/wan` first sees a few of a clip's latent frames at a time, at their true times (`FrameWindow`);
- `toys/wan`'s 512 text keys are the real words and ONE zero key that counts for all padding (`PaddingKey`);
- `toys/pixart` first sees whole scenes at a quarter of the area: its position table stretches to fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.toys.latents import Batch, Pool
from dit_accel.train.toys.models import Denoiser, build_denoiser, build_tokenizer, timesteps_of
from dit_accel.train.toys.naming import Naming

DROP_TEXT = 0.1
WAN_TEXT_LENGTH = 512  # WanPipeline pads to it with zeros and masks nothing
MAX_WORDS = 20


class PaddingKey:
    """Makes cross-attention treat its last key as many equal keys: an additive mask of log(count)."""

    def __init__(self, transformer: nn.Module):
        self.mask: torch.Tensor | None = None
        for block in transformer.blocks:
            block.attn2.register_forward_pre_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple) -> tuple:
        hidden, text, *_ = args
        return hidden, text, None if self.mask is None else self.mask.to(text.dtype), None

    def set(self, lengths: torch.Tensor, width: int) -> None:
        """`lengths` `[B]`: real words of each prompt among `width` keys; the zero key comes after them."""
        place = torch.arange(width, device=lengths.device)
        words = torch.zeros(len(lengths), width, device=lengths.device)
        words = words.masked_fill(place[None] >= lengths[:, None], -math.inf)
        padding = torch.log((WAN_TEXT_LENGTH - lengths).float())[:, None]
        self.mask = torch.cat([words, padding], dim=1)[:, None, None]  # [B, 1, 1, width + 1]


class FrameWindow:
    """Gives the rotary table the true places of a sample that is part of a clip, or a smaller picture of it.

    `frames` are the latent frame numbers present; `stride` is the distance of neighbours in Y and X: 2 for a
    scene drawn at half the size, so that its things are as far apart as at full size.
    """

    def __init__(self, transformer: nn.Module):
        self.frames: Sequence[int] | None = None
        self.stride = 1
        self.rope = transformer.rope
        self.rope.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, args: tuple, output: tuple) -> tuple | None:
        if self.frames is None and self.stride == 1:
            return None
        frames = list(range(args[0].shape[2]) if self.frames is None else self.frames)
        height, width = (size * self.stride for size in args[0].shape[-2:])
        whole = type(module).forward(module, args[0].new_empty(1, 1, max(frames) + 1, height, width))
        grids = (table.unflatten(1, (-1, height, width))[:, frames] for table in whole)  # [1, F, Y, X, 1, D]
        return tuple(grid[:, :, :: self.stride, :: self.stride].flatten(1, 3) for grid in grids)


def sample_sigma(count: int, shift: float) -> torch.Tensor:
    """Noise levels `[B]`: stratified uniform, then the schedule's shift."""
    uniform = (torch.arange(count) + torch.rand(count)) / count
    return shift * uniform / (1 + (shift - 1) * uniform)


class Task:
    """The loss of one toy's denoiser on a batch of latents and captions."""

    def __init__(self, toy: str, denoiser: Denoiser):
        self.toy = toy
        self.tokenizer = build_tokenizer()
        self.naming = Naming(denoiser)
        if toy == "wan":
            self.padding = PaddingKey(denoiser.transformer)
            self.window = FrameWindow(denoiser.transformer)

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
        words = self.tokenizer(captions, padding="longest", return_tensors="pt").to(noisy.device)
        mask = words.attention_mask
        text = denoiser.text_encoder(words.input_ids, mask).last_hidden_state
        if self.toy == "wan":
            text = torch.cat(
                [text * mask[..., None].to(text.dtype), text.new_zeros(len(text), 1, text.shape[2])], dim=1
            )
            self.padding.set(mask.sum(1), mask.shape[1])
            self.window.frames = frames
            output = denoiser.transformer(noisy, timesteps_of(sigma), text, return_dict=False)[0]
            self.padding.mask = self.window.frames = None
            return output
        return denoiser.transformer(
            noisy,
            text,
            timestep=timesteps_of(sigma),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]


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
    if toy == "wan":
        task.window.stride = plan.stride
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
