"""Qwen-Image: text to image, Edit and Edit-Plus (reference images), Layered.

Class: QwenImageTransformer2DModel; `transformer_blocks` of QwenImageTransformerBlock, which takes
    (visual, text) and returns (text, visual). `attn` returns (visual, text); each stream has its own MLP.
Guidance: two forwards per step, cond first, only with `true_cfg_scale` > 1 and a negative prompt. The two
    branches have text of different lengths. A padded prompt brings a mask over the joint sequence.
References: `img_shapes` lists the target and then the reference images, and the visual tokens follow it.
    Layered models (`use_layer3d_rope`) list every layer, all of one size, and then one reference.
Edit 2511 (`zero_cond_t`): references are modulated as at time 0, so the block argument `temb` has 2 B rows.
Checked with diffusers 0.42.1.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from dit_accel.families.base import Config, Family, Grid, Inputs, Modulation, Place


def images(inputs: Inputs) -> list[Grid]:
    """Shapes of the first sample's images: samples of one batch share them, as `pos_embed` demands."""
    first = inputs["img_shapes"][0]
    return [first] if isinstance(first[0], int) else list(first)


def grid(config: Config, inputs: Inputs) -> Grid:
    """The target; a layered target's layers count as frames."""
    shapes = images(inputs)
    frames, rows, columns = shapes[0]
    layers = len(shapes) - 1 if config.use_layer3d_rope else 1
    return layers * frames, rows, columns


def references(config: Config, inputs: Inputs) -> int:
    """Tokens of the images that follow the target."""
    return sum(map(prod, images(inputs))) - prod(grid(config, inputs))


def vectors(denoiser: Any, inputs: Inputs) -> Mapping[str, Any]:
    """One vector modulates both streams of all blocks; in Edit 2511 the references have one of time 0."""
    latents = inputs["hidden_states"]
    times = inputs["timestep"].to(latents.dtype)
    if denoiser.zero_cond_t:
        times = torch.cat([times, times * 0])
    vector = denoiser.norm_out.silu(denoiser.time_text_embed(times, latents, inputs.get("additional_t_cond")))
    target = vector.chunk(2)[0] if denoiser.zero_cond_t else vector
    return {VISUAL: vector, TEXT: target, OUTPUT: target}


VISUAL, TEXT = "transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1"
OUTPUT = "norm_out.linear"
QWEN_IMAGE = Family(
    name="qwen_image",
    transformers=("QwenImageTransformer2DModel",),
    blocks=("transformer_blocks",),
    self_attention=("attn",),
    cross_attention=(),
    sublayers=("attn", "img_mlp", "txt_mlp"),
    sublayer_tokens={"attn": "all", "txt_mlp": "text"},
    streams=("hidden_states", "encoder_hidden_states"),
    returns=("encoder_hidden_states", "hidden_states"),
    token_order="text,visual",
    guidance="sequential",
    grid=grid,
    references=references,
    unbatched=("image_rotary_emb",),
    positions="pos_embed",
    frame_axis=None,
    output="image",
    guidance_argument="true_cfg_scale",
    fps=1,
    places=(
        Place("img_in", axis=1),
        Place("pos_embed", axis=0, items=(0,)),
        Place("proj_out", axis=1, back=True),
    ),
    raster_arguments=("controlnet_block_samples",),
    time_embedder="time_text_embed.timestep_embedder",
    modulation=Modulation(
        (VISUAL, TEXT, OUTPUT), ("time_text_embed",), ("additional_t_cond", "guidance"), vectors
    ),
)
