"""What a recipe and a measured table say about backends, seen through a pipeline."""

import pytest
import torch
from contract.rows import build, plain, run

import dit_accel
from dit_accel.recipe import Recipe
from dit_accel_kernels.block_attention import break_even

CHOICES = """
schema = 1
[choices]
F = {{ method = "full", backend = "auto" }}
b = {{ method = "brick", extent = [0, 0, 0], brick = [1, 2, 2] }}
[attention.both]
"*" = ["{letter}"]
"""


def accelerated(letter: str, sites: str = "*"):
    pipe = build("wan")
    text = CHOICES.format(letter=letter).replace('"*"', f'"{sites}"')
    return pipe, dit_accel.accelerate(pipe, Recipe.from_text(text, name="here"))


def test_full_through_a_backend_equals_the_model_to_rounding_and_is_counted():
    pipe, handle = accelerated("F")
    torch.testing.assert_close(run(pipe, "wan"), plain("wan"), atol=1e-4, rtol=1e-4)
    counters = handle.report().counters
    assert counters["full_auto"] > 0 and "full" not in counters and handle.report().did_something


def test_lists_that_are_slower_than_dense_run_dense_and_the_report_and_the_plan_say_so(monkeypatch):
    monkeypatch.setattr(break_even, "density", lambda *given: 0.0)
    pipe, handle = accelerated("b", "blocks.*.attn1")
    with pytest.warns(UserWarning, match="changed nothing"):
        out = run(pipe, "wan")
    assert torch.equal(out, plain("wan"))
    assert set(handle.report().counters) == {"full"}
    said = "brick runs dense: density"
    assert any(said in note for note in handle.report().notes) and said in handle.explain()
