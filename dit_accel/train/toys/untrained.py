"""`toys/cogvideox`: real classes, random weights, for all but picture quality."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from dit_accel.train.toys.text import TEXT_WIDTH, build_text_encoder, build_tokenizer


def build_cogvideox(seed: int = 0) -> CogVideoXPipeline:
    """The pipeline; the same seed gives the same weights."""
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=8,
        out_channels=8,
        time_embed_dim=64,
        text_embed_dim=TEXT_WIDTH,
        num_layers=6,
        sample_width=16,
        sample_height=16,
        sample_frames=17,
        patch_size=1,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=64,
        sample_width=64,
    )
    return CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(T5EncoderModel, T5Config).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    )
