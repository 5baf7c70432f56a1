"""PixArt-alpha and PixArt-Sigma.

Class: PixArtTransformer2DModel; `transformer_blocks` of BasicTransformerBlock, which returns its one stream.
    `attn2` is not gated and carries an additive mask over padded text. The block argument `timestep` is the
    modulation table [B, 6 C], not a time.
Guidance: one batch, [uncond, cond]. The pipelines enter no cache context and have no `callback_on_step_end`.
Positions: a sin-cos table that `pos_embed` adds to the patches; nothing rotates.
Checked with diffusers 0.42.1.
"""

from dit_accel.families.base import Config, Family, Grid, Inputs, Place


def grid(config: Config, inputs: Inputs) -> Grid:
    """Patches of the latent image [B, C, Y, X]."""
    rows, columns = inputs["hidden_states"].shape[-2:]
    return 1, rows // config.patch_size, columns // config.patch_size


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
)
