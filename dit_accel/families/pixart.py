"""PixArt-alpha and PixArt-Sigma.

Class: PixArtTransformer2DModel; `transformer_blocks` of BasicTransformerBlock, which returns its one stream.
    `attn2` is not gated and carries an additive mask over padded text. The block argument `timestep` is the
    modulation table [B, 6 C], not a time.
Guidance: one batch, [uncond, cond]. The pipelines enter no cache context and have no `callback_on_step_end`.
Positions: a sin-cos table that `pos_embed` adds to the patches; nothing rotates.
Checked with diffusers 0.42.1.
"""

from collections.abc import Mapping
from typing import Any

from dit_accel.families.base import Config, Family, Grid, Inputs, Modulation, Place


def grid(config: Config, inputs: Inputs) -> Grid:
    """Patches of the latent image [B, C, Y, X]."""
    rows, columns = inputs["hidden_states"].shape[-2:]
    return 1, rows // config.patch_size, columns // config.patch_size


def vectors(denoiser: Any, inputs: Inputs) -> Mapping[str, Any]:
    """One projection for all blocks; alpha at 1024 is told its resolution and aspect ratio too."""
    norm, latents = denoiser.adaln_single, inputs["hidden_states"]
    sizes = inputs.get("added_cond_kwargs") or {"resolution": None, "aspect_ratio": None}
    vector = norm.emb(inputs["timestep"], **sizes, batch_size=latents.shape[0], hidden_dtype=latents.dtype)
    return {"adaln_single.linear": norm.silu(vector)}


PIXART = Family(
    name="pixart",
    transformers=("PixArtTransformer2DModel",),
    blocks=("transformer_blocks",),
    self_attention=("attn1",),
    cross_attention=("attn2",),
    sublayers=("attn1", "attn2", "ff"),
    streams=("hidden_states",),
    returns=("hidden_states",),
    token_order="visual",
    guidance="batched",
    grid=grid,
    unbatched=(),
    positions="pos_embed",
    frame_axis=None,
    output="image",
    guidance_argument="guidance_scale",
    fps=1,
    places=(Place("pos_embed", axis=1), Place("proj_out", axis=1, back=True)),
    raster_arguments=("attention_mask",),
    time_embedder="adaln_single.emb.timestep_embedder",
    modulation=Modulation(("adaln_single.linear",), ("adaln_single.emb",), ("added_cond_kwargs",), vectors),
)
