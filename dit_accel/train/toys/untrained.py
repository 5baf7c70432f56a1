"""`toys/cogvideox` and `toys/qwen_image`: real classes, random weights, for all but picture quality."""

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLQwenImage,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, T5Config, T5EncoderModel

from dit_accel.train.toys.models import TEXT_WIDTH, build_text_encoder, build_tokenizer


def build_untrained(toy: str, seed: int = 0) -> CogVideoXPipeline | QwenImagePipeline:
    """The pipeline of `toys/cogvideox` or `toys/qwen_image`; the same seed gives the same weights."""
    torch.manual_seed(seed)
    return _cogvideox() if toy == "cogvideox" else _qwen_image()


def _cogvideox() -> CogVideoXPipeline:
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


def _qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=32,
        out_channels=8,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=1.0, max_shift=0.9, shift_terminal=0.02
    )
    return QwenImagePipeline(
        tokenizer=build_tokenizer(chat=True),
        text_encoder=_qwen_text_encoder(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )


def _qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    tokens = {
        f"{kind}_token_id": 60 + index
        for index, kind in enumerate(("vision_start", "vision_end", "image", "video"))
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    ).eval()
