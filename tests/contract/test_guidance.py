"""Guidance on an interval, Wan 2.2's two denoisers, and equal noise without guidance (promise 5)."""

import pytest
import torch
from contract.rows import ROWS, STEPS, build, during_step, fresh, hushed, plain, recipe, run

import dit_accel
from dit_accel.testing import TINY

APPROXIMATE = [row for row in ROWS if not ROWS[row].exact]


def end_guidance(pipe, step: int):
    """What a user's callback may do to a Wan pipeline, which asks for its guidance at every step."""
    return during_step(pipe, step, lambda: setattr(pipe, "_guidance_scale", 1.0))


@pytest.mark.parametrize("row", APPROXIMATE)
def test_guidance_may_end_in_the_middle(row: str):
    case = "wan"
    outputs = []
    for _ in range(2):
        pipe = build(case)
        handle = dit_accel.accelerate(pipe, recipe(row, case))
        with end_guidance(pipe, 4):
            outputs.append(run(pipe, case))
        assert outputs[-1].isfinite().all()
        assert all(
            not letters
            for each in handle.report().rows
            if each.branch == "uncond"
            for letters in each.ran[5:]
        )
        assert torch.equal(run(pipe, case), fresh(row, case)[0])
    assert torch.equal(*outputs)


def test_an_interval_of_guidance_under_the_neutral_recipe_is_bit_equal():
    pipe = build("wan")
    with end_guidance(pipe, 4):
        expected = run(pipe, "wan")
    with dit_accel.accelerated(pipe, "neutral"), end_guidance(pipe, 4):
        assert torch.equal(run(pipe, "wan"), expected)
    assert not torch.equal(expected, plain("wan"))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.875, 1.0])
def test_wan22_hands_over_at_its_boundary(ratio: float):
    pipe = build("wan22")
    pipe.register_to_config(boundary_ratio=ratio)
    expected = run(pipe, "wan22")
    handle = dit_accel.accelerate(pipe, recipe("reuse span, stored gates", "wan22"))
    latents = run(pipe, "wan22")
    report = handle.report()
    high = {row.site.startswith("transformer_2."): row for row in report.rows if row.branch == "cond"}
    levels = report.levels
    first = [level * 1000 >= ratio * 1000 for level in levels]
    for second, row in high.items():
        assert [bool(letters) for letters in row.ran] == [mine != second for mine in first]
        ran = [letters for letters in row.ran if letters]
        assert ran[0] != "R"  # the other denoiser's outputs are not ours
    assert not torch.equal(latents, expected) and latents.isfinite().all()
    assert not any("was planned" in note for note in report.notes)


@hushed()
@pytest.mark.parametrize("row", ["share heads, copy", "reuse heads", "mixed", "share span"])
@pytest.mark.parametrize("case", ["cogvideox"])  # PixArt shows its guidance nowhere
def test_equal_noise_without_guidance_is_no_pair(row: str, case: str):
    """Two prompts from one seed: the halves of the batch are equal at the first step, and are no CFG pair."""
    noise = (
        TINY[case]
        .noise(1, TINY[case].size, 0)
        .repeat(2, *[1] * len(TINY[case].latent_shape(TINY[case].size)))
    )
    results = []
    for accelerate in (False, True):
        pipe = build(case)
        if accelerate:
            dit_accel.accelerate(pipe, recipe(row, case))
        results.append(run(pipe, case, batch=2, guidance=1.0, latents=noise, steps=STEPS))
    if row.startswith("share"):
        assert torch.equal(*results)  # nothing to share, so nothing may change
    assert results[1].isfinite().all()
