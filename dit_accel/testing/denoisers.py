"""Tiny random denoisers of the real diffusers classes: 4 heads, 4 blocks, every weight and bias random."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import nn

HEADS = 4
LATENT_CHANNELS = 4
TEXT_WIDTH = 16
TEXT_TOKENS = 7


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Seed the weights made inside without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def shake(model: nn.Module) -> nn.Module:
    """Move every vector (norms, biases) off its initial 0 or 1, so that each one changes the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def wan(seed: int, layers: int, in_channels: int = LATENT_CHANNELS, image_width: int | None = None):
    """Wan; with `image_width` the 2.1 image-to-video model, which also attends to image embeddings."""
    with weights_from(seed):
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_WIDTH,
            freq_dim=32,
            ffn_dim=96,
            num_layers=layers,
            cross_attn_norm=True,
            rope_max_seq_len=64,
            image_dim=image_width,
            added_kv_proj_dim=HEADS * 12 if image_width else None,
        )
        return shake(model)


def cogvideox(seed: int, layers: int, rotary: bool = True, patch_size_t: int | None = None):
    """CogVideoX 5b; 2b without `rotary`; 1.5 with `patch_size_t`."""
    # 1.5 slices its rotary table from this size, the others resize theirs to what they get
    height, width = (32, 32) if patch_size_t else (8, 10)
    with weights_from(seed):
        model = CogVideoXTransformer3DModel(
            num_attention_heads=HEADS,
            attention_head_dim=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            time_embed_dim=32,
            text_embed_dim=TEXT_WIDTH,
            num_layers=layers,
            sample_width=width,
            sample_height=height,
            sample_frames=9,
            patch_size=2,
            patch_size_t=patch_size_t,
            temporal_compression_ratio=4,
            max_text_seq_length=TEXT_TOKENS,
            use_rotary_positional_embeddings=rotary,
        )
        return shake(model)


def pixart(seed: int, layers: int, micro_conditions: bool = False):
    """PixArt-Sigma; with `micro_conditions` PixArt-alpha at 1024, told its resolution and aspect ratio."""
    with weights_from(seed):
        model = PixArtTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=12,
            in_channels=LATENT_CHANNELS,
            out_channels=2 * LATENT_CHANNELS,
            num_layers=layers,
            cross_attention_dim=HEADS * 12,
            sample_size=128 if micro_conditions else 64,
            patch_size=2,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=micro_conditions,
        )
        return shake(model)


def qwen_image(seed: int, layers: int, zero_cond_t: bool = False):
    """Qwen-Image; with `zero_cond_t` the Edit 2511 model, which modulates references as at time 0."""
    with weights_from(seed):
        model = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=4 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=layers,
            attention_head_dim=16,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        )
        return shake(model)
