"""The toys' tokenizers and text encoders, and prompts as each pipeline hands them to its transformer."""

import torch
from diffusers import QwenImagePipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from dit_accel.scenes.caption import WORDS

TEXT_WIDTH = 64


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


def build_qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """A two-layer causal language model over the toys' words; its picture tower is there and never runs."""
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
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


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


class Prompts:
    """Captions to text `[B, L, TEXT_WIDTH]` and mask `[B, L]`; word i of a caption is at place i.

    Of `toys/qwen_image` it is the pipeline's own code that cuts the chat template's head off and keeps its
    tail, so that training sees what sampling sees.
    """

    def __init__(self, toy: str, text_encoder: nn.Module):
        self.causal = toy == "qwen_image"
        self.tokenizer, self.text_encoder = build_tokenizer(chat=self.causal), text_encoder
        self.pipeline = self.causal and QwenImagePipeline(
            scheduler=None, vae=None, text_encoder=text_encoder, tokenizer=self.tokenizer, transformer=None
        )

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Text and mask, long enough for the longest of `captions`."""
        if self.pipeline:
            device = next(self.text_encoder.parameters()).device
            text, mask = self.pipeline.encode_prompt(captions, device)
            return text, text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask
        words = self.tokenizer(captions, padding="longest", return_tensors="pt")
        words = words.to(next(self.text_encoder.parameters()).device)
        text = self.text_encoder(words.input_ids, words.attention_mask).last_hidden_state
        return text, words.attention_mask
