"""Wan 2.1 and 2.2: text to video, image to video, and the two-transformer 14B models.

Class: WanTransformer3DModel; `blocks` of WanTransformerBlock, which returns its one stream.
Guidance: two forwards per step, cond first. Wan 2.2 14B runs `transformer` above the boundary noise level
    and `transformer_2` below it; either may be absent.
Image to video 2.1: `attn2` makes two attention calls, first over the image tokens, then over the text, whose
    length diffusers fixes at 512. The condition frames join on the channel axis: the grid does not change.
TI2V 5B: the timestep is [B, tokens], so the block argument `temb` has a token axis.
Checked with diffusers 0.42.1.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.families.base import Config, Family, Grid, Inputs, Modulation, Place


def grid(config: Config, inputs: Inputs) -> Grid:
    """Patches of the latent video [B, C, F, Y, X]."""
    frames, rows, columns = inputs["hidden_states"].shape[2:]
    p_frames, p_rows, p_columns = config.patch_size
    return frames // p_frames, rows // p_rows, columns // p_columns


def vectors(denoiser: Any, inputs: Inputs) -> Mapping[str, Any]:
    """One projection for all blocks; its embedder works in a dtype of its own (float32)."""
    embedder = denoiser.condition_embedder
    wave = embedder.timesteps_proj(inputs["timestep"])
    wave = wave.to(next(embedder.time_embedder.parameters()).dtype)
    vector = embedder.time_embedder(wave).type_as(inputs["encoder_hidden_states"])
    return {EMBEDDER: wave, PROJECTION: embedder.act_fn(vector)}


EMBEDDER, PROJECTION = "condition_embedder.time_embedder", "condition_embedder.time_proj"
WAN = Family(
    name="wan",
    transformers=("WanTransformer3DModel",),
    blocks=("blocks",),
    self_attention=("attn1",),
    cross_attention=("attn2",),
    sublayers=("attn1", "attn2", "ffn"),
    streams=("hidden_states",),
    returns=("hidden_states",),
    token_order="visual",
    guidance="sequential",
    grid=grid,
    unbatched=("rotary_emb",),
    positions="rope",
    frame_axis=2,
    output="video",
    guidance_argument="guidance_scale",
    fps=16,
    denoisers=("transformer", "transformer_2"),
    places=(
        Place("patch_embedding", axis=2, spread=True),
        Place("rope", axis=1),
        Place("proj_out", axis=1, back=True),
    ),
    placed_arguments={"timestep": 1},
    time_embedder="condition_embedder.time_embedder",
    modulation=Modulation((EMBEDDER, PROJECTION), (), (), vectors),
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_image"),
)
