"""The toys' parts, from real diffusers and transformers classes, and the pipelines made of them."""

import math
from dataclasses import dataclass

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from dit_accel.train.toys.text import (
    TEXT_WIDTH,
    build_qwen_text_encoder,
    build_text_encoder,
    build_tokenizer,
)
from dit_accel.train.toys.vae import PIXART_CHANNELS, QWEN_CHANNELS, WAN_CHANNELS

SHIFT = {"wan": 3.0, "pixart": 3.0, "qwen_image": 4.0}  # of the noise schedule at the default size


@dataclass(frozen=True)
class Defaults:
    """The arguments a toy is called with when the user gives none: the contents of `generation.json`."""

    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    fps: int
    trained: bool


DEFAULTS = {
    "wan": Defaults(64, 64, 33, 20, 4.0, 12, True),
    "pixart": Defaults(256, 256, 1, 20, 4.0, 1, True),
    "cogvideox": Defaults(64, 64, 17, 20, 4.0, 8, False),
    "qwen_image": Defaults(128, 128, 1, 20, 4.0, 1, True),
}


class Denoiser(nn.Module):
    """What is trained together: the transformer and the text encoder, whose words begin with no meaning."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


def build_denoiser(toy: str) -> Denoiser:
    """The untrained transformer and text encoder of a toy that is trained."""
    if toy == "wan":
        return Denoiser(_wan_transformer(), build_text_encoder(UMT5EncoderModel, UMT5Config))
    if toy == "qwen_image":
        return Denoiser(_qwen_transformer(), build_qwen_text_encoder())
    return Denoiser(_pixart_transformer(), build_text_encoder(T5EncoderModel, T5Config))


def _wan_transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=WAN_CHANNELS,
        out_channels=WAN_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=512,
        num_layers=6,
        rope_max_seq_len=128,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def _pixart_transformer() -> PixArtTransformer2DModel:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=PIXART_CHANNELS,
        out_channels=PIXART_CHANNELS,
        num_layers=6,
        cross_attention_dim=128,
        # 32 is one of the four sizes the pipeline's resolution binning knows: 256 pixels
        sample_size=32,
        patch_size=1,
        caption_channels=TEXT_WIDTH,
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def _qwen_transformer() -> QwenImageTransformer2DModel:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * QWEN_CHANNELS,
        out_channels=QWEN_CHANNELS,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def _qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    # half the side, half the shift: averaging four latents into one halves their noise (arXiv:2403.03206)
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=256,
        base_shift=math.log(SHIFT["qwen_image"] / 2),
        max_image_seq_len=1024,
        max_shift=math.log(SHIFT["qwen_image"]),
        shift_terminal=0.02,
    )


def assemble(
    toy: str, denoiser: Denoiser, vae: nn.Module
) -> WanPipeline | PixArtSigmaPipeline | QwenImagePipeline:
    """The pipeline as a user gets it."""
    parts = {
        "tokenizer": build_tokenizer(chat=toy == "qwen_image"),
        "text_encoder": denoiser.text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": denoiser.transformer.eval(),
    }
    if toy == "wan":
        return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT[toy]), **parts)
    if toy == "qwen_image":
        return QwenImagePipeline(scheduler=_qwen_scheduler(), **parts)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT[toy]
    )
    return PixArtSigmaPipeline(scheduler=scheduler, **parts)


def count_parameters(module: nn.Module) -> int:
    """All parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def timesteps_of(toy: str, sigma: torch.Tensor) -> torch.Tensor:
    """The noise level as the pipeline tells it to the transformer: times 1000, but for Qwen-Image."""
    return sigma if toy == "qwen_image" else sigma * 1000
