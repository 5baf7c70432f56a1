"""Two processes that split the sequence give what one process gives."""

from dataclasses import replace

import pytest
import torch

import dit_accel
from dit_accel.testing import TINY

# plain Ulysses splits the text as well: its length must be even
TEXT_TOKENS = {"wan": (7, 7), "qwen_image": (8, 6)}
ORDERS = ["accelerate first", "parallelism first"]


@pytest.mark.parametrize("name", TEXT_TOKENS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_neutral_recipe_changes_no_bit_on_two_ranks(name, order, run_ulysses):
    case = replace(TINY[name], text_tokens=TEXT_TOKENS[name])
    alone = case.call(case.build(), steps=2)

    for plain, neutral in run_ulysses(name, [None, "neutral"], order, case.text_tokens, steps=2):
        # a joint sequence becomes [text, visual] of rank 0, then of rank 1: attention sums in another order
        rounding = 0.0 if name == "wan" else 1e-5 * alone.abs().max()
        assert (plain["latents"] - alone).abs().max() <= rounding
        assert torch.equal(neutral["latents"], plain["latents"]), neutral["report"]
        assert any(heads == 2 for _, heads, _, _ in neutral["shapes"])


ARROW = """
schema = 1
[choices]
w = {{ method = "arrow", radius = [0, 1, 1], brick = [1, 2, 2] }}
[noise]
edges = [1.0, 0.0]
[attention.both]
"{site}" = ["w"]
"""


def write_arrow(folder, site):
    recipe = folder / "arrow.toml"
    recipe.write_text(ARROW.format(site=site))
    return str(recipe)


def test_a_window_means_the_same_tokens_on_two_ranks(run_ulysses, tmp_path):
    recipe = write_arrow(tmp_path, "blocks.*.attn1")
    case = replace(TINY["wan"], text_tokens=TEXT_TOKENS["wan"])
    pipe = case.build()
    dit_accel.accelerate(pipe, recipe)
    alone = case.call(pipe, steps=2)

    for (result,) in run_ulysses("wan", [recipe], text_tokens=case.text_tokens, steps=2):
        assert (result["latents"] - alone).abs().max() <= 1e-5 * alone.abs().max(), result["report"]
        assert "keep the model's order between blocks: ranks split the sequence" in result["report"]


def test_interleaved_text_and_visual_tokens_run_dense_and_say_so(run_ulysses, tmp_path):
    recipe = write_arrow(tmp_path, "transformer_blocks.*.attn")
    tokens = TEXT_TOKENS["qwen_image"]

    for plain, result in run_ulysses("qwen_image", [None, recipe], text_tokens=tokens, steps=2):
        assert torch.equal(result["latents"], plain["latents"])
        assert "interleave text and visual" in result["report"]
