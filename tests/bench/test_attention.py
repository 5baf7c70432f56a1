"""All columns with the same attention."""

import pytest

from dit_accel import api
from dit_accel.bench.attention import check_attention, dense_through_op, through_op
from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe
from dit_accel.testing import TINY

MIXED = """
schema = 1
[choices]
F = { method = "full" }
R = { method = "reuse" }
C = { method = "compute" }
b = { method = "brick", extent = [1, 1, 1] }
[noise]
edges = [1.0, 0.5, 0.0]
[attention.both]
"blocks.0.attn1" = ["FFbb", "F"]
[timeline.both]
"blocks.1" = "CCCCCRCRCR"
[made_for]
steps = 10
"""


def test_full_heads_and_unnamed_layers_go_through_the_op():
    pipe = TINY["wan"].build(layers=2)
    with api.accelerated(pipe, Recipe.from_text(MIXED, name="mixed")) as handle:
        TINY["wan"].call(pipe, steps=10)
        plain = handle.report().counters
    served = through_op(Recipe.from_text(MIXED, name="mixed"))
    assert served.name == "mixed" and Recipe.from_text(served.to_toml()) == served
    with api.accelerated(pipe, served) as handle:
        TINY["wan"].call(pipe, steps=10)
        through = handle.report().counters
    assert plain["full"] > 0 and "full_auto" not in plain
    assert "full" not in through and through["full_auto"] > plain["full"]
    assert (through["brick"], through["reuse"]) == (plain["brick"], plain["reuse"])


def test_a_recipe_without_attention_gets_a_letter_of_its_own():
    served = through_op(Recipe.from_text('schema = 1\n[choices]\na = { method = "reuse" }'))
    assert {choice.method for choice in served.choices.values()} == {"reuse", "full"}
    assert dense_through_op().attention == {"both": {"*": ("a",)}}


def test_who_else_serves_is_refused():
    assert check_attention("op") == "op"
    with pytest.raises(BadUsage, match="--attention flash"):
        check_attention("flash")
