"""CogVideoX 2b, 5b, 5b image to video, and 1.5 (patches of two latent frames).

Class: CogVideoXTransformer3DModel; `transformer_blocks` of CogVideoXBlock, which returns (visual, text).
    `ff` runs once over [text, visual]; `attn1` returns (visual, text).
Guidance: one batch, [uncond, cond].
Positions: 5b and 1.5 rotate by `image_rotary_emb`, which the pipeline makes once before its loop; 2b adds a
    sin-cos table in `patch_embed` and passes None.
Checked with diffusers 0.42.1.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.families.base import Config, Family, Grid, Inputs, Modulation, Place


def grid(config: Config, inputs: Inputs) -> Grid:
    """Patches of the latent video [B, F, C, Y, X]."""
    _, frames, _, rows, columns = inputs["hidden_states"].shape
    return frames // (config.patch_size_t or 1), rows // config.patch_size, columns // config.patch_size


def vectors(denoiser: Any, inputs: Inputs) -> Mapping[str, Any]:
    """One vector modulates all blocks and the output norm; 1.5 image to video adds the constant `ofs`."""
    dtype = inputs["hidden_states"].dtype
    wave = denoiser.time_proj(inputs["timestep"]).to(dtype)
    vector = denoiser.time_embedding(wave, inputs.get("timestep_cond"))
    if denoiser.ofs_embedding is not None:
        vector = vector + denoiser.ofs_embedding(denoiser.ofs_proj(inputs["ofs"]).to(dtype))
    return dict.fromkeys(PROJECTIONS, denoiser.norm_out.silu(vector))


PROJECTIONS = ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm2.linear", "norm_out.linear")
COGVIDEOX = Family(
    name="cogvideox",
    transformers=("CogVideoXTransformer3DModel",),
    blocks=("transformer_blocks",),
    self_attention=("attn1",),
    cross_attention=(),
    sublayers=("attn1", "ff"),
    sublayer_tokens={"attn1": "all", "ff": "all"},
    streams=("hidden_states", "encoder_hidden_states"),
    returns=("hidden_states", "encoder_hidden_states"),
    token_order="text,visual",
    guidance="batched",
    grid=grid,
    unbatched=("image_rotary_emb",),
    positions="image_rotary_emb",
    frame_axis=1,
    output="video",
    guidance_argument="guidance_scale",
    fps=8,
    places=(Place("patch_embed", axis=1), Place("proj_out", axis=1, back=True)),
    placed_arguments={"image_rotary_emb": 0},
    time_embedder="time_embedding",
    modulation=Modulation(
        PROJECTIONS, ("time_embedding", "ofs_embedding"), ("timestep_cond", "ofs"), vectors
    ),
)
