"""Tiny random pipelines: prompt embeddings in, latents out, in milliseconds on a CPU.

    case = TINY["wan"]
    pipe = case.build()
    latents = case.call(pipe, steps=4, seed=0, batch=2)

Sizes differ on every axis (3 frames, 4 rows, 5 columns of tokens) and data has a mean far from zero. Sample i
of a batch has its own noise and prompt, the same ones at every batch size.
"""

# pyright: reportArgumentType=false
# diffusers annotates single classes and one-element tuples where it takes more

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from dit_accel.testing import companions, denoisers
from dit_accel.testing.accuracy import far_from_zero
from dit_accel.testing.denoisers import LATENT_CHANNELS, TEXT_TOKENS, TEXT_WIDTH

Size = tuple[int, int, int]  # height and width in pixels, frames


@dataclass(frozen=True)
class TinyPipeline:
    """One case: how it is built, and called with all that its text encoder would have made."""

    name: str
    family: str  # the family's name in dit_accel.families
    pipeline: Callable[[int, int, bool], DiffusionPipeline]  # (layers, seed, complete)
    size: Size
    guidance: float
    embeds: Callable[[Tensor, Tensor], dict[str, Any]]  # the call arguments that hold two prompts' embeddings
    latent_shape: Callable[[Size], tuple[int, ...]]  # of one sample
    text_tokens: tuple[int, int] = (TEXT_TOKENS, TEXT_TOKENS)  # prompt, negative prompt
    can_complete: bool = True  # with a VAE, a text encoder and a tokenizer, for calls with words
    guidance_argument: str = "guidance_scale"
    count_argument: str | None = (
        "num_images_per_prompt"  # None: the pipeline makes one per prompt whatever it is told
    )
    needs_image: bool = False

    def build(self, layers: int = 4, seed: int = 0, complete: bool = False) -> DiffusionPipeline:
        """A new pipeline; `complete` adds VAE, text encoder and tokenizer, to save it or give it a prompt."""
        if complete and not self.can_complete:
            raise ValueError(
                f"{self.name} is built from embeddings only; complete cases: {', '.join(COMPLETE)}"
            )
        pipe = self.pipeline(layers, seed, complete)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(
        self,
        pipe: DiffusionPipeline,
        *,
        steps: int = 4,
        seed: int = 0,
        prompt_seed: int = 0,
        batch: int = 1,
        images_per_prompt: int = 1,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        **more: Any,
    ) -> Tensor:
        """The latents of one run; `more` goes to the pipeline as it is."""
        guidance = self.guidance if guidance is None else guidance
        size = (height or self.size[0], width or self.size[1], num_frames or self.size[2])
        count = batch * images_per_prompt if self.count_argument else batch
        arguments = {
            "num_inference_steps": steps,
            "height": size[0],
            "width": size[1],
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(1000 * seed + sample) for sample in range(count)],
            "latents": self.noise(count, size, seed),
            self.guidance_argument: guidance,
            **self.embeds(self.text(batch, prompt_seed, 0), self.text(batch, prompt_seed, 1)),
        }
        if self.count_argument:
            arguments[self.count_argument] = images_per_prompt
        if self.size[2] > 1:
            arguments["num_frames"] = size[2]
        if self.needs_image:
            arguments["image"] = gradient_image(size)
        if guidance <= 1:
            arguments = {name: value for name, value in arguments.items() if not name.startswith("negative_")}
        return pipe(**arguments | more, return_dict=False)[0]  # pyright: ignore[reportCallIssue]

    def noise(self, count: int, size: Size, seed: int) -> Tensor:
        """Initial latents around 0.5, one seed per sample."""
        shape = self.latent_shape(size)
        return (
            torch.stack([far_from_zero(*shape, seed=1000 * seed + sample) for sample in range(count)]) - 0.5
        )

    def text(self, batch: int, prompt_seed: int, branch: int) -> Tensor:
        """Embeddings of `batch` prompts, of the cond (0) or uncond (1) branch."""
        tokens = self.text_tokens[branch]
        seeds = [100_000 + 10_000 * branch + 100 * prompt_seed + sample for sample in range(batch)]
        return torch.stack(
            [far_from_zero(tokens, TEXT_WIDTH, seed=seed) for seed in seeds]
        )  # [B, tokens, width]


def gradient_image(size: Size) -> Image.Image:
    """A start or reference image without any symmetry."""
    return Image.linear_gradient("L").resize((size[1], size[0])).convert("RGB")


def _wan(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.WanPipeline(
        transformer=denoisers.wan(seed, layers),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=companions.wan_vae(seed) if complete else None,
        text_encoder=companions.t5(seed, multilingual=True) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _wan22(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.WanPipeline(
        transformer=denoisers.wan(seed, layers),
        transformer_2=denoisers.wan(seed + 1, layers),
        boundary_ratio=0.875,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        vae=companions.wan_vae(seed) if complete else None,
        text_encoder=companions.t5(seed, multilingual=True) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _wan_ti2v(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    pipe = _wan(layers, seed, complete)
    pipe.register_to_config(expand_timesteps=True)
    return pipe


def _wan_i2v(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    image_encoder, image_processor = companions.clip_vision(seed)
    # noise, a mask of 4 frames per latent, and the latents of the start image
    channels = LATENT_CHANNELS + 4 + LATENT_CHANNELS
    return diffusers.WanImageToVideoPipeline(
        transformer=denoisers.wan(seed, layers, in_channels=channels, image_width=TEXT_WIDTH),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=companions.wan_vae(seed),
        image_encoder=image_encoder,
        image_processor=image_processor,
        text_encoder=companions.t5(seed, multilingual=True) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _cogvideox(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        transformer=denoisers.cogvideox(seed, layers),
        scheduler=diffusers.CogVideoXDPMScheduler(),
        vae=companions.cogvideox_vae(seed) if complete else None,
        text_encoder=companions.t5(seed) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _cogvideox_2b(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    pipe = _cogvideox(layers, seed, complete)
    pipe.register_modules(
        transformer=denoisers.cogvideox(seed, layers, rotary=False),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return pipe


def _cogvideox_15(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    pipe = _cogvideox(layers, seed, complete)
    pipe.register_modules(transformer=denoisers.cogvideox(seed, layers, patch_size_t=2))
    return pipe


def _pixart_sigma(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        transformer=denoisers.pixart(seed, layers),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=companions.image_vae(seed) if complete else None,
        text_encoder=companions.t5(seed) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _pixart_alpha(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.PixArtAlphaPipeline(
        transformer=denoisers.pixart(seed, layers, micro_conditions=True),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=companions.image_vae(seed) if complete else None,
        text_encoder=companions.t5(seed) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _qwen_image(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.QwenImagePipeline(
        transformer=denoisers.qwen_image(seed, layers),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=companions.qwen_image_vae(seed) if complete else None,
        text_encoder=companions.qwen_vl(seed) if complete else None,
        tokenizer=companions.tokenizer() if complete else None,
    )


def _qwen_image_edit(layers: int, seed: int, complete: bool) -> DiffusionPipeline:
    return diffusers.QwenImageEditPipeline(
        transformer=denoisers.qwen_image(seed, layers, zero_cond_t=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=companions.MeanPoolVae(),
        text_encoder=None,
        tokenizer=None,
        processor=None,
    )


def _plain(cond: Tensor, uncond: Tensor) -> dict[str, Any]:
    return {"prompt_embeds": cond, "negative_prompt_embeds": uncond}


def _cogvideox_embeds(cond: Tensor, uncond: Tensor) -> dict[str, Any]:
    return _plain(cond, uncond) | {"max_sequence_length": TEXT_TOKENS}


def _padded(cond: Tensor, uncond: Tensor) -> dict[str, Any]:
    masks = [torch.ones(text.shape[:2]) for text in (cond, uncond)]
    masks[0][:, -2:] = masks[1][:, -4:] = 0  # PixArt pads and masks
    return _plain(cond, uncond) | {
        "prompt_attention_mask": masks[0],
        "negative_prompt_attention_mask": masks[1],
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def _masked(cond: Tensor, uncond: Tensor) -> dict[str, Any]:
    return _plain(cond, uncond) | {
        "prompt_embeds_mask": torch.ones(cond.shape[:2], dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(uncond.shape[:2], dtype=torch.long),
    }


def _wan_latents(size: Size) -> tuple[int, ...]:
    return LATENT_CHANNELS, (size[2] - 1) // 4 + 1, size[0] // 8, size[1] // 8


def _cogvideox_latents(size: Size) -> tuple[int, ...]:
    return (size[2] - 1) // 4 + 1, LATENT_CHANNELS, size[0] // 8, size[1] // 8


def _cogvideox_15_latents(size: Size) -> tuple[int, ...]:
    frames, *rest = _cogvideox_latents(size)
    return frames + frames % 2, *rest  # the pipeline pads to the patch of two latent frames


def _pixart_latents(size: Size) -> tuple[int, ...]:
    return LATENT_CHANNELS, size[0] // 8, size[1] // 8


def _packed_latents(size: Size) -> tuple[int, ...]:
    return (size[0] // 16) * (size[1] // 16), 4 * LATENT_CHANNELS


def _packed_edit_latents(size: Size) -> tuple[int, ...]:
    return (size[0] // 128) * (size[1] // 128), 4 * LATENT_CHANNELS


VIDEO: dict[str, Any] = {"size": (64, 80, 9)}
IMAGE: dict[str, Any] = {"size": (64, 80, 1)}
WAN: dict[str, Any] = VIDEO | {
    "family": "wan",
    "guidance": 5.0,
    "embeds": _plain,
    "latent_shape": _wan_latents,
    "count_argument": "num_videos_per_prompt",
}
COGVIDEOX: dict[str, Any] = VIDEO | {
    "family": "cogvideox",
    "guidance": 6.0,
    "embeds": _cogvideox_embeds,
    "count_argument": None,
}
PIXART: dict[str, Any] = IMAGE | {
    "family": "pixart",
    "guidance": 4.5,
    "embeds": _padded,
    "latent_shape": _pixart_latents,
}
QWEN_IMAGE: dict[str, Any] = IMAGE | {
    "family": "qwen_image",
    "guidance": 4.0,
    "embeds": _masked,
    "text_tokens": (7, 5),
    "guidance_argument": "true_cfg_scale",
}

TINY: dict[str, TinyPipeline] = {
    case.name: case
    for case in (
        TinyPipeline("wan", pipeline=_wan, **WAN),
        TinyPipeline("wan22", pipeline=_wan22, **WAN),
        TinyPipeline("wan_ti2v", pipeline=_wan_ti2v, **WAN),
        # diffusers fixes the text length of the 2.1 image-to-video model at 512
        TinyPipeline("wan_i2v", pipeline=_wan_i2v, text_tokens=(512, 512), needs_image=True, **WAN),
        TinyPipeline("cogvideox", pipeline=_cogvideox, latent_shape=_cogvideox_latents, **COGVIDEOX),
        TinyPipeline("cogvideox_2b", pipeline=_cogvideox_2b, latent_shape=_cogvideox_latents, **COGVIDEOX),
        TinyPipeline("cogvideox_15", pipeline=_cogvideox_15, latent_shape=_cogvideox_15_latents, **COGVIDEOX),
        TinyPipeline("pixart_sigma", pipeline=_pixart_sigma, **PIXART),
        TinyPipeline("pixart_alpha", pipeline=_pixart_alpha, **PIXART),
        TinyPipeline("qwen_image", pipeline=_qwen_image, latent_shape=_packed_latents, **QWEN_IMAGE),
        TinyPipeline(
            "qwen_image_edit",
            pipeline=_qwen_image_edit,
            latent_shape=_packed_edit_latents,
            can_complete=False,
            needs_image=True,
            **QWEN_IMAGE | {"size": (512, 640, 1)},
        ),
    )
}
COMPLETE = tuple(name for name, case in TINY.items() if case.can_complete)
