"""Tiny random companions of a denoiser: VAEs, text encoders and a tokenizer, of the real classes."""

# pyright: reportArgumentType=false
# diffusers annotates single classes and one-element tuples where it takes more

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from dit_accel.testing.denoisers import LATENT_CHANNELS, TEXT_WIDTH, weights_from

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: knows any prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


def t5(seed: int, multilingual: bool = False):
    """T5 as in CogVideoX and PixArt; `multilingual` UMT5 as in Wan."""
    config = {
        "vocab_size": VOCABULARY,
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "pad_token_id": 0,
    }
    with weights_from(seed):
        model = UMT5EncoderModel(UMT5Config(**config)) if multilingual else T5EncoderModel(T5Config(**config))
        return model.eval().requires_grad_(False)


def qwen_vl(seed: int):
    """Qwen 2.5 VL as in Qwen-Image."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
    with weights_from(seed):
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        return Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def wan_vae(seed: int) -> AutoencoderKLWan:
    """4 channels, 4 frames and 8 x 8 pixels to a latent, as the real one."""
    with weights_from(seed):
        model = AutoencoderKLWan(
            base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.1, 0.2, -0.2],
            latents_std=[1.1, 0.9, 1.2, 0.8],
        )
        return model.eval().requires_grad_(False)


def qwen_image_vae(seed: int) -> AutoencoderKLQwenImage:
    """As `wan_vae`, in the class of Qwen-Image."""
    with weights_from(seed):
        model = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=LATENT_CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.1, 0.2, -0.2],
            latents_std=[1.1, 0.9, 1.2, 0.8],
        )
        return model.eval().requires_grad_(False)


def cogvideox_vae(seed: int) -> AutoencoderKLCogVideoX:
    """4 channels, 4 frames and 8 x 8 pixels to a latent, as the real one."""
    with weights_from(seed):
        model = AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=LATENT_CHANNELS,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        return model.eval().requires_grad_(False)


def image_vae(seed: int) -> AutoencoderKL:
    """4 channels and 8 x 8 pixels to a latent, as in PixArt."""
    with weights_from(seed):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=2,
            sample_size=64,
        )
        return model.eval().requires_grad_(False)


class MeanPoolVae(ModelMixin, ConfigMixin):
    """Encodes by averaging 64 x 64 pixels: the edit pipelines scale any reference to a megapixel first."""

    temperal_downsample = (False,) * 6  # the pipelines read the factor, 2 ** 6, from its length

    @register_to_config
    def __init__(self, z_dim: int = LATENT_CHANNELS):
        super().__init__()
        self.config_only = torch.nn.Parameter(
            torch.zeros(1), requires_grad=False
        )  # ModelMixin.dtype needs one
        self.register_to_config(latents_mean=[0.1] * z_dim, latents_std=[0.9] * z_dim)

    def encode(self, pixels: Tensor) -> SimpleNamespace:
        """[B, 3, 1, Y, X] to [B, z, 1, Y / 64, X / 64]."""
        mean = F.avg_pool3d(pixels, (1, 64, 64))
        return SimpleNamespace(latents=torch.cat([mean, mean[:, : self.config["z_dim"] - 3]], dim=1))


def clip_vision(seed: int) -> tuple[CLIPVisionModel, Any]:
    """The image encoder of Wan 2.1 image to video and its preprocessor: 5 tokens of TEXT_WIDTH channels."""
    # imported here: without torchvision it logs a line on import, which only this model should cause
    from transformers import CLIPImageProcessor

    config = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    with weights_from(seed):
        return CLIPVisionModel(config).eval().requires_grad_(False), processor
