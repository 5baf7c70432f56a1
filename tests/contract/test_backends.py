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
    # to rounding: where the tokens stand is settled before the first attention call, and dense runs there
    torch.testing.assert_close(out, plain("wan"), atol=1e-5, rtol=1e-5)
    assert set(handle.report().counters) == {"full"}
    said = "brick runs dense: density"
    assert any(said in note for note in handle.report().notes) and said in handle.explain()


def test_one_group_of_a_site_may_be_slower_than_dense_and_the_others_run(monkeypatch):
    from dit_accel.methods.attention import base

    refuse = lambda q, k, v, plan: "too long" if plan.density > 0.4 else None  # noqa: E731
    monkeypatch.setattr(base, "slower_than_dense", refuse)
    text = CHOICES.format(letter="b").replace('"*" = ["b"]', '"blocks.*.attn1" = ["bwFr"]')
    more = 'w = { method = "window", radius = [9, 9, 9], brick = [1, 2, 2] }\nr = { method = "reuse" }\n[att'
    pipe = build("wan")
    handle = dit_accel.accelerate(
        pipe, Recipe.from_text(text.replace("[att", more, 1), name="here"), strict=True
    )
    run(pipe, "wan")
    report = handle.report()
    assert report.counters["brick"] > 0 and "window" not in report.counters
    assert any("window runs dense: too long" in note for note in report.notes)
