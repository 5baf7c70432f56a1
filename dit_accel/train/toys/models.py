"""The toys' parts, from real diffusers and transformers classes, and the pipelines made of them."""

from dataclasses import dataclass

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from dit_accel.scenes.caption import WORDS
from dit_accel.train.toys.vae import PIXART_CHANNELS, WAN_CHANNELS

TEXT_WIDTH = 64
SHIFT = {"wan": 3.0, "pixart": 3.0}  # of the noise schedule, in training and in sampling


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
    "qwen_image": Defaults(128, 128, 1, 20, 4.0, 1, False),
}


class Denoiser(nn.Module):
    """What is trained together: the transformer and the text encoder, whose words begin with no meaning."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder


def build_denoiser(toy: str) -> Denoiser:
    """The untrained transformer and text encoder of `toys/wan` or `toys/pixart`."""
    if toy == "wan":
        return Denoiser(_wan_transformer(), build_text_encoder(UMT5EncoderModel, UMT5Config))
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


def build_text_encoder(model_class: type, config_class: type) -> nn.Module:
    """A two-layer T5-like encoder over the toys' words."""
    config = config_class(
        vocab_size=len(WORDS) + 3,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return model_class(config)


def build_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, lower case, `</s>` at the end: so "" is one token, as with T5.

    With `chat` there is no `</s>`; the marks of Qwen's chat template are tokens, and so is the end of a line.
    Then the template's head has the 34 tokens that the pipeline cuts off.
    """
    marks = ("<|im_start|>", "<|im_end|>", "\n") if chat else ()
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS, *marks))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    if chat:
        tokenizer.add_special_tokens(list(marks[:2]))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def assemble(toy: str, denoiser: Denoiser, vae: nn.Module) -> WanPipeline | PixArtSigmaPipeline:
    """The pipeline as a user gets it."""
    parts = {
        "tokenizer": build_tokenizer(),
        "text_encoder": denoiser.text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": denoiser.transformer.eval(),
    }
    if toy == "wan":
        return WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT[toy]), **parts)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT[toy]
    )
    return PixArtSigmaPipeline(scheduler=scheduler, **parts)


def count_parameters(module: nn.Module) -> int:
    """All parameters of `module`."""
    return sum(p.numel() for p in module.parameters())


def timesteps_of(sigma: torch.Tensor) -> torch.Tensor:
    """Both pipelines tell the transformer the noise level times 1000."""
    return sigma * 1000
