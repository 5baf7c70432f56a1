"""Tokens in brick order once per forward: equal to doing it at every call, and where it must not be done."""

from contextlib import contextmanager

import pytest
import torch
from contract.rows import HEAD, build, during_step, hushed, names, run
from peft import LoraConfig
from torch import nn

import dit_accel
from dit_accel import block_heads, placement
from dit_accel.recipe import Recipe

CASES = (
    "wan", "wan22", "wan_ti2v", "wan_i2v", "cogvideox", "cogvideox_2b", "cogvideox_15", "pixart_sigma",
    "qwen_image",
)  # fmt: skip
ODD = {"height": 112, "width": 48}  # 7 rows and 3 columns of tokens: no brick fits
ONCE, EACH_CALL = "once per forward", "in brick order and back at every call"


def recipe_of(case: str, letters: str, more: str = "") -> Recipe:
    """Every self-attention by these letters; `more` tables may say {blocks} and {attn}."""
    tables = '[attention.both]\n"{blocks}.*.{attn}" = ["' + letters + '"]\n' + more
    return Recipe.from_text((HEAD + tables).format(**names(case)))


@contextmanager
def at_every_call(monkeypatch: pytest.MonkeyPatch):
    """Without placement."""
    with monkeypatch.context() as patch:
        patch.setattr(placement, "decide", lambda *_: None)
        yield


def both_ways(monkeypatch, case: str, recipe: Recipe, prepare=lambda pipe: None, **call):
    """Latents and reports of the run with tokens placed once and of the run that permutes at each call."""
    results = []
    for once in (True, False):
        pipe = build(case)
        handle = dit_accel.accelerate(pipe, recipe)
        prepare(pipe)
        if once:
            results.append((run(pipe, case, **call), handle.report()))
        else:
            with at_every_call(monkeypatch):
                results.append((run(pipe, case, **call), handle.report()))
    return results


def assert_same(monkeypatch, case: str, recipe: Recipe, prepare=lambda pipe: None, **call) -> None:
    (latents, report), (expected, local) = both_ways(monkeypatch, case, recipe, prepare, **call)
    assert any(ONCE in note for note in report.notes), report.notes
    assert not any(EACH_CALL in note for note in report.notes), report.notes
    assert any(EACH_CALL in note for note in local.notes)
    assert not any("non-finite" in note for note in report.notes), report.notes
    assert (report.rows, report.counters, report.memory_bytes) == (
        local.rows,
        local.counters,
        local.memory_bytes,
    )
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_in_raster(monkeypatch, case: str, recipe: Recipe, reason: str, prepare=lambda pipe: None) -> None:
    (latents, report), (expected, _) = both_ways(monkeypatch, case, recipe, prepare)
    assert any(reason in note for note in report.notes), report.notes
    assert not any(ONCE in note for note in report.notes)
    assert torch.equal(latents, expected)


def with_arguments(change):
    """A preparation that changes what the denoiser is called with: `change(kwargs)` gives new ones."""

    def prepare(pipe) -> None:
        def before(module: nn.Module, args, kwargs):
            return args, {**kwargs, **change(kwargs)}

        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True)

    return prepare


# ---- equal


@pytest.mark.parametrize("letters", ["b", "Fbet", "tkrb", "pqbk"])
@pytest.mark.parametrize("case", CASES)
def test_placed_once_is_placed_at_every_call(monkeypatch, case: str, letters: str):
    assert_same(monkeypatch, case, recipe_of(case, letters))


@pytest.mark.parametrize("case", ["wan", "cogvideox", "qwen_image"])
def test_odd_grids_and_batches(monkeypatch, case: str):
    recipe = Recipe.from_text(
        recipe_of(case, "bFtw").to_toml().replace("brick = [1, 2, 2]", "brick = [2, 2, 2]")
    )
    assert_same(monkeypatch, case, recipe, batch=2, **ODD)


def test_a_time_for_every_token_moves_with_it(monkeypatch):
    def tilt(kwargs):  # as TI2V gives it: frames at another time than others
        tokens = kwargs["timestep"].shape[1]
        return {"timestep": kwargs["timestep"] * torch.linspace(1, 0.3, tokens)}

    assert_same(monkeypatch, "wan_ti2v", recipe_of("wan_ti2v", "bFtb"), with_arguments(tilt))


SPANS = {
    "over the first block": '"{blocks}.0" = "CrrCrrCrC"',
    "over the last block": '"{blocks}.1-2" = "CRRCRRCRC"',
    "over all": '"*" = "CRCRCRCRC"',
    "shared": '"{blocks}.0" = "CssCssCsC"\n"{blocks}.2" = "CccCccCcC"',
}


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("case", ["wan", "cogvideox", "qwen_image"])
def test_a_span_at_either_end_is_skipped_in_the_same_order(monkeypatch, case: str, span: str):
    assert_same(monkeypatch, case, recipe_of(case, "bFtb", "[timeline.both]\n" + SPANS[span] + "\n"))


@pytest.mark.parametrize("case", ["wan", "cogvideox", "qwen_image"])
def test_visual_tokens_of_cond_are_shared_in_brick_order(monkeypatch, case: str):
    assert_same(monkeypatch, case, recipe_of(case, "bscF"))


# ---- in the model's own order


@pytest.mark.parametrize("case", ["wan", "cogvideox", "pixart_sigma", "qwen_image"])
def test_a_window_of_tokens_keeps_the_order(monkeypatch, case: str):
    assert_in_raster(monkeypatch, case, recipe_of(case, "bxFb"), "a method of the recipe needs it")


def test_bricks_of_two_sizes_keep_the_order(monkeypatch):
    more = '[choices.o]\nmethod = "brick"\nextent = [0, 0, 1]\nbrick = [1, 1, 4]\n'
    recipe = Recipe.from_text(recipe_of("wan", "bobF", more).to_toml())
    assert_in_raster(monkeypatch, "wan", recipe, "in 2 sizes of bricks")


def residuals(kwargs):
    """What a ControlNet adds between blocks: different at every token."""
    hidden = kwargs["hidden_states"]
    return {"controlnet_block_samples": [torch.linspace(-1, 1, hidden.shape[1])[None, :, None]]}


def test_controlnet_residuals_keep_the_order(monkeypatch):
    recipe = recipe_of("qwen_image", "bFtb")
    reason = "controlnet_block_samples is given in it"
    assert_in_raster(monkeypatch, "qwen_image", recipe, reason, with_arguments(residuals))


def test_residuals_that_come_late_read_nothing_of_another_order():
    pipe, calls = build("qwen_image"), []
    handle = dit_accel.accelerate(pipe, recipe_of("qwen_image", "FRrb"))

    def late(kwargs):
        calls.append(1)
        return residuals(kwargs) if len(calls) > 2 else {}

    with_arguments(late)(pipe)
    run(pipe, "qwen_image")
    report = handle.report()
    assert any("controlnet_block_samples" in note for note in report.notes)
    assert any("ran dense where reuse was planned: no out" in note for note in report.notes), report.notes


@hushed()  # with reference images no head finds its grid
def test_reference_images_and_other_forwards_keep_the_order(monkeypatch):
    edit = dit_accel.accelerate(pipe := build("qwen_image_edit"), recipe_of("qwen_image_edit", "bFFb"))
    run(pipe, "qwen_image_edit")
    assert any("the sequence holds reference images" in note for note in edit.report().notes)

    class Controlled(type(build("wan", 1).transformer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    def other_class(pipe) -> None:
        pipe.transformer.__class__ = Controlled

    assert_in_raster(
        monkeypatch, "wan", recipe_of("wan", "b"), "Controlled has a forward of its own", other_class
    )


# ---- nothing is left permuted


@pytest.mark.parametrize("case", ["wan", "cogvideox", "pixart_sigma", "qwen_image"])
def test_an_exception_in_a_forward_leaves_nothing_permuted(case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe_of(case, "bFtb"))
    expected = run(pipe, case)
    block = pipe.transformer.get_submodule(f"{names(case)['blocks']}.1")
    forward = block.forward

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    def break_block() -> None:
        block.forward = fail

    with pytest.raises(KeyboardInterrupt), during_step(pipe, 3, break_block):
        run(pipe, case)
    block.forward = forward
    assert handle._session.at is None
    assert torch.equal(run(pipe, case), expected)
    handle.restore()
    assert torch.equal(run(pipe, case), run(build(case), case))


def test_a_place_used_outside_of_a_forward_is_the_models_own():
    pipe, plain = build("wan"), build("wan")
    dit_accel.accelerate(pipe, recipe_of("wan", "b"))
    run(pipe, "wan")
    video = torch.randn(1, 4, 3, 8, 10)
    for name in ("rope", "patch_embedding"):
        found, wanted = (
            pipe.transformer.get_submodule(name)(video),
            plain.transformer.get_submodule(name)(video),
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_after_a_non_finite_output_the_forward_is_repeated_in_the_models_order():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe_of("wan", "b"))
    attend = block_heads.attend

    def poisoned(tokens, groups, out) -> None:
        attend(tokens, groups, out)
        out.fill_(float("nan"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_heads, "attend", poisoned)
        latents = run(pipe, "wan")
    assert torch.equal(latents, run(build("wan"), "wan"))
    assert any("non-finite output at step 0" in note for note in handle.report().notes)


@pytest.mark.parametrize("targets", [["proj_out"], ["proj_out", "img_in", "to_q"]])
def test_a_lora_on_a_place_keeps_its_meaning(monkeypatch, targets):
    """The wrapper that LoRA puts around a submodule takes over its hook, whenever it comes and goes."""

    def add(pipe) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(config, "one")

    recipe = recipe_of("qwen_image", "bFtb")
    assert_same(monkeypatch, "qwen_image", recipe, add)
    pipe = build("qwen_image")
    handle = dit_accel.accelerate(pipe, recipe)
    expected = run(pipe, "qwen_image")
    add(pipe)
    assert not torch.equal(run(pipe, "qwen_image"), expected)
    pipe.transformer.delete_adapters("one")
    assert torch.equal(run(pipe, "qwen_image"), expected)
    handle.restore()
    assert not [m for m in pipe.transformer.modules() if "_diffusers_hook" in m.__dict__]


# ---- one call of the op


@pytest.mark.parametrize(("case", "branches"), [("wan", 2), ("cogvideox", 1)])
def test_block_heads_of_a_site_go_in_one_call(monkeypatch, case: str, branches: int):
    kinds = []
    plain = block_heads.block_attention

    def watched(q, k, v, plan, **rest):
        kinds.append([kind.name for kind in plan.kinds])
        assert q.shape[2] == 4, "no head is copied out of q"
        return plain(q, k, v, plan, **rest)

    monkeypatch.setattr(block_heads, "block_attention", watched)
    pipe = build(case)
    dit_accel.accelerate(pipe, recipe_of(case, "tbre"))
    run(pipe, case)
    assert len(kinds) == 9 * 3 * branches  # steps, layers
    seen = {tuple(call) for call in kinds}
    assert ("EMIT_TAIL", "ATTEND", "SKIP", "EMIT_RESIDUAL") in seen
    assert ("MERGE", "ATTEND", "SKIP", "ADD") in seen
