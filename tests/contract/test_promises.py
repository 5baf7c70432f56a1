"""What every method owes every pipeline (docs/DESIGN.md, promises 1 to 4, 6 and 9 to 11)."""

import gc
import weakref

import pytest
import torch
from contract.rows import (
    FEW,
    PAIRS,
    PIPELINES,
    ROWS,
    SITUATIONS,
    STORING,
    WIDE,
    build,
    denoisers,
    during_step,
    fresh,
    hushed,
    memory_of,
    names,
    plain,
    poison,
    recipe,
    run,
)

import dit_accel
from dit_accel.errors import DenseFallback, MemoryBound, NothingDone
from dit_accel.recipe import Recipe
from dit_accel.testing import TINY


def has_grid(case: str) -> bool:
    """Reference images beside the target make a sequence that is no grid."""
    return case != "qwen_image_edit"


def no_copy(row: str, case: str) -> bool:
    """Cond's text is no answer for an uncond text of another length."""
    return row in ("share module, copy", "share span, copy") and case == "qwen_image"


def snapshot(pipe) -> dict:
    """All that installing may change, by identity."""
    found = {}
    for module in denoisers(pipe):
        for name, child in module.named_modules():
            found[id(module), name] = (
                dict(child.__dict__), child.forward.__func__, id(getattr(child, "processor", None)),
                len(child._forward_hooks), len(child._forward_pre_hooks), child._compiled_call_impl,
            )  # fmt: skip
    return found


@pytest.mark.parametrize("case", TINY)
def test_the_neutral_recipe_is_bit_equal(case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, "neutral", strict=True)
    assert torch.equal(run(pipe, case), plain(case))
    report = handle.report()
    assert not report.did_something and not report.expects_work
    assert report.counters["full"] > 0 and report.counters["compute"] > 0
    assert report.notes == () and report.memory_bytes == 0


@hushed()
@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_restore_leaves_nothing(row: str, case: str):
    pipe = build(case)
    before = snapshot(pipe)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    run(pipe, case)
    handle.restore()
    handle.restore()
    assert snapshot(pipe) == before
    assert not any("_diffusers_hook" in m.__dict__ for module in denoisers(pipe) for m in module.modules())
    assert torch.equal(run(pipe, case), plain(case))


@hushed()
@pytest.mark.parametrize(("row", "case"), WIDE)
def test_it_did_something_or_says_so(row: str, case: str):
    latents, report = fresh(row, case)
    assert latents.isfinite().all()
    assert report.family == TINY[case].family and report.steps == 9 and report.runs == 1
    if ROWS[row].exact:
        assert torch.equal(latents, plain(case))
        assert report.counters[ROWS[row].method] > 0 and not report.did_something
        return
    if ROWS[row].needs_grid and not has_grid(case):
        assert any("reference images" in note for note in report.notes)
        if not ROWS[row].stores:
            assert torch.equal(latents, plain(case)) and not report.did_something
        return
    if no_copy(row, case):
        assert any("what is stored has shape" in note for note in report.notes) and not report.did_something
        assert torch.equal(latents, plain(case))
        return
    assert report.did_something and report.counters[ROWS[row].method] > 0
    assert not torch.equal(latents, plain(case))
    assert (latents - plain(case)).abs().max() < 10 * plain(case).abs().max()
    allowed = ("in brick order and back at every call", "once per forward", "keep the model's order")
    if case == "wan22":
        allowed += ("became compute",)  # the second denoiser starts with nothing stored
    assert all(any(words in note for words in allowed) for note in report.notes), report.notes


@hushed()
@pytest.mark.parametrize(("row", "case"), WIDE)
def test_memory_is_what_was_predicted(row: str, case: str):
    _, report = fresh(row, case)
    assert report.memory_bytes == report.predicted_bytes
    assert (report.memory_bytes > 0) == ROWS[row].stores


@hushed()  # sharing without guidance
@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_state_never_leaks_into_the_next_call(row: str, case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    run(pipe, case)
    for situation in [name for name, one in SITUATIONS.items() if one.fits(case)]:
        again = run(pipe, case, situation=situation)
        expected, report = fresh(row, case, situation)
        assert torch.equal(again, expected), situation
        assert handle.report().counters == report.counters, situation
        assert handle.report().rows == report.rows, situation
        assert handle.report().memory_bytes == handle.report().predicted_bytes == report.memory_bytes, (
            situation
        )


@hushed()
@pytest.mark.parametrize(("row", "case"), FEW)
def test_an_interrupted_run_leaves_nothing_behind(row: str, case: str):
    pipe = build(case)

    def interrupt():
        raise KeyboardInterrupt

    dit_accel.accelerate(pipe, recipe(row, case))
    with pytest.raises(KeyboardInterrupt), during_step(pipe, 2, interrupt):
        run(pipe, case, seed=3)
    assert torch.equal(run(pipe, case), fresh(row, case)[0])


@hushed()
@pytest.mark.parametrize(("row", "case"), FEW)
def test_two_pipelines_at_once_share_nothing(row: str, case: str):
    """Another run of the same recipe in the middle of ours, on other weights."""
    one, other = build(case), TINY[case].build(layers=3, seed=5)
    dit_accel.accelerate(one, recipe(row, case))
    dit_accel.accelerate(other, recipe(row, case))
    with during_step(one, 3, lambda: run(other, case, seed=2)):
        assert torch.equal(run(one, case), fresh(row, case)[0])


@hushed()
@pytest.mark.parametrize(("row", "case"), STORING)
def test_cond_never_reads_what_uncond_stored(row: str, case: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dit_accel.install._finite", lambda output: True)
    outputs: dict[bool, list] = {}
    for poisoned in (False, True):
        pipe, seen = build(case), []
        handle = dit_accel.accelerate(pipe, recipe(row, case))
        hooks = [
            m.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
            for m in denoisers(pipe)
        ]
        with during_step(pipe, 4, lambda: poison(handle, "uncond") if poisoned else None):  # noqa: B023
            run(pipe, case)
        outputs[poisoned] = seen
        for hook in hooks:
            hook.remove()
    batched = len(outputs[True]) == 9
    first = 5 if batched else 10  # the first forward after the poison
    clean, dirty = outputs[False][first], outputs[True][first]
    if batched:
        clean, dirty = clean.chunk(2)[1], dirty.chunk(2)[1]
    assert torch.equal(clean, dirty)


@hushed()
@pytest.mark.parametrize(("row", "case"), STORING)
def test_non_finite_memory_makes_the_rest_of_the_run_dense(row: str, case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    with during_step(pipe, 3, lambda: poison(handle)):
        latents = run(pipe, case)
    assert latents.isfinite().all()
    report = handle.report()
    noted = [note for note in report.notes if "non-finite output at step" in note]
    if not noted:  # what was stored at step 3 is not read again in this row
        assert torch.equal(latents, fresh(row, case)[0])
        return
    assert "dense for the rest of the run" in noted[0]
    assert all(not letters for each in report.rows for letters in each.ran[7:])
    assert torch.equal(run(pipe, case), fresh(row, case)[0])  # the next run tries again


@hushed()
@pytest.mark.parametrize(("row", "case"), FEW)
def test_a_lost_value_is_computed_and_reported(row: str, case: str):
    if ROWS[row].tables.count("c") and "copy" in row:
        pytest.skip("a copy reads nothing from an earlier step")
    for strict in (False, True):
        pipe = build(case)
        handle = dit_accel.accelerate(pipe, recipe(row, case), strict=strict)
        with during_step(pipe, 3, lambda: memory_of(handle).release()):  # noqa: B023
            if strict:
                with pytest.raises(DenseFallback, match="strict=True asked for no fallback"):
                    run(pipe, case)
            else:
                assert run(pipe, case).isfinite().all()
                assert any("was planned: no " in note for note in handle.report().notes)
        assert torch.equal(run(pipe, case), fresh(row, case)[0])


@hushed()  # where the whole run is dense
@pytest.mark.parametrize(("row", "case"), FEW)
def test_the_memory_bound_of_a_recipe_is_kept(row: str, case: str):
    needed = fresh(row, case)[1].memory_bytes
    pipe = build(case)
    enough = recipe(row, case, f"[limits]\nmemory_gb = {needed / 2**30!r}\n")
    with dit_accel.accelerated(pipe, enough):
        assert torch.equal(run(pipe, case), fresh(row, case)[0])
    small = recipe(row, case, f"[limits]\nmemory_gb = {(needed - 1) / 2**30!r}\n")
    with dit_accel.accelerated(pipe, small) as handle:
        run(pipe, case)
        assert any("it runs dense" in note for note in handle.report().notes)
        assert handle.report().memory_bytes < needed
    with (
        dit_accel.accelerated(pipe, small, strict=True),
        pytest.raises(MemoryBound, match=r"Raise \[limits\]"),
    ):
        run(pipe, case)


@pytest.mark.parametrize(("row", "case"), [pair for pair in FEW if not pair[0].startswith("mixed")])
def test_few_steps_say_so_and_are_bit_equal(row: str, case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    with pytest.warns(UserWarning, match="changed nothing in this run"):
        latents = run(pipe, case, steps=4)
    assert torch.equal(latents, plain(case, steps=4))
    assert "4 steps are too few for reuse and sharing (limit 8): all compute" in handle.report().notes
    handle.restore()
    dit_accel.accelerate(pipe, recipe(row, case), strict=True)
    with pytest.raises(NothingDone, match="changed nothing"):
        run(pipe, case, steps=4)


LIMITS = {
    "window": ('w = { method = "window", radius = [9, 9, 9] }', "w", 1e-5),
    "window, by tokens": ('w = { method = "window", radius = [9, 9, 9], mask = "tokens" }', "w", 1e-5),
    "arrow": ('w = { method = "arrow", radius = [9, 9, 9], brick = [1, 2, 2] }', "w", 1e-5),
    "brick": ('w = { method = "brick", extent = [[0, 1], [0, 1], 9], brick = [1, 2, 2] }', "w", 1e-5),
    "coreset": ('w = { method = "coreset", rho = 0 }', "w", 1e-5),
    "coreset of queries": (
        'w = { method = "coreset", rho = 0, queries = "selected", keys = "all" }',
        "w",
        1e-5,
    ),
    "coreset as published": (
        'w = { method = "coreset", rho = 0, queries = "selected", keys = "as_queries", reweight = false }',
        "w",
        1e-5,
    ),
    "tail": ('w = { method = "tail", extent = [9, 9, 9], brick = [1, 2, 2] }', "w", 1e-5),
    "tail of age 0": ('w = { method = "tail", extent = [0, 0, 0], brick = [1, 2, 2], max_age = 0 }', "w", 0),
    "residual": ('w = { method = "residual", radius = [9, 9, 9], brick = [1, 2, 2] }', "w", 1e-5),
    "residual of age 0": ('w = { method = "residual", radius = [0, 0, 0], max_age = 0 }', "w", 0),
    "reuse": ('w = { method = "reuse", max_age = 0 }', "w", 0),
    "share": ('w = { method = "share_branch", max_age = 0 }', "w", 0),
    "share, copy": ('w = { method = "share_branch", difference = false, max_age = 0 }', "w", 0),
}


@hushed()
@pytest.mark.parametrize("case", PIPELINES)
@pytest.mark.parametrize("limit", LIMITS)
def test_every_method_has_a_setting_where_it_is_exact(limit: str, case: str):
    choice, letter, tolerance = LIMITS[limit]
    pattern = "{blocks}.*.{attn}".format(**names(case))
    text = f'schema = 1\n[choices]\n{choice}\n[attention.both]\n"{pattern}" = ["{letter}"]\n'
    pipe = build(case)
    dit_accel.accelerate(pipe, Recipe.from_text(text))
    latents = run(pipe, case)
    if tolerance == 0:
        assert torch.equal(latents, plain(case))
    else:
        scale = plain(case).abs().max()
        assert (latents - plain(case)).abs().max() <= 20 * tolerance * scale  # 9 steps of rounding


@pytest.mark.parametrize("row", ROWS)
def test_a_dropped_pipeline_is_freed(row: str):
    case = "wan"
    pipe = build(case)
    dit_accel.accelerate(pipe, recipe(row, case))
    run(pipe, case)
    gone = [weakref.ref(pipe), weakref.ref(pipe.transformer)]
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_dropped_bare_denoiser_is_freed():
    module = build("wan").transformer
    dit_accel.accelerate(module, recipe("window", "wan"))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
