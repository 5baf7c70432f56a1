"""Every rival on real pipelines: it skips work, leaves nothing behind, or says why it is not valid."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dit_accel import api
from dit_accel.bench import dbcache, rivals
from dit_accel.bench.attention import dense_through_op
from dit_accel.bench.rivals import RIVALS, switched_on
from dit_accel.bench.scene import Scene, guided
from dit_accel.bench.work import counted
from dit_accel.errors import BadUsage, DitAccelError
from dit_accel.families import family_of
from dit_accel.testing import TINY

STEPS, LAYERS = 8, 3
BOLD: Mapping[str, Any] = {
    "first_block_cache": 0.9,
    "cache_dit": 0.9,
    "cache_dit_taylor": 0.9,
    "seacache": 0.9,
}
NOT_VALID = {
    ("wan", "pab"): "one memory for both guidance branches",
    ("wan", "fastercache"): "second half of a batch",
    ("pixart_sigma", "seacache"): "PixArtSigmaPipeline gives none",
    ("cogvideox", "seacache"): "CogVideoXPipeline gives none",
    ("qwen_image", "seacache"): "QwenImagePipeline gives none",
    ("qwen_image", "pab"): "one memory for both guidance branches",
    ("qwen_image", "fastercache"): "second half of a batch",
}
CASES = ("wan", "pixart_sigma", "cogvideox", "qwen_image")


def scene_of(case: str, pipe: Any, **more: Any) -> Scene:
    denoiser = getattr(pipe, "transformer", None)
    family = family_of(denoiser)
    assert family is not None
    return Scene(pipe, family, STEPS, **more)


@pytest.fixture(scope="module")
def dense() -> dict[str, tuple[Any, torch.Tensor, int]]:
    """Of each case a pipeline, its dense latents and the sublayers that it runs."""
    made = {}
    for case in CASES:
        pipe = TINY[case].build(layers=LAYERS)
        with counted(pipe, scene_of(case, pipe).family) as work:
            latents = TINY[case].call(pipe, steps=STEPS)
        made[case] = pipe, latents, work.samples
    return made


def state_of(pipe: Any) -> tuple[Any, ...]:
    """What a rival may have replaced."""
    hooked = {
        name: list(module.__dict__["_diffusers_hook"].hooks)
        for name, module in pipe.transformer.named_modules()
        if "_diffusers_hook" in module.__dict__
    }
    forwards = [name for name, module in pipe.transformer.named_modules() if "forward" in module.__dict__]
    attributes = {k for k in vars(pipe.transformer) if k not in ("_diffusers_hook", "_cache_config")}
    return (
        {k: v for k, v in hooked.items() if v},
        forwards,
        dict(vars(type(pipe))),
        attributes,
        set(vars(pipe)),
    )


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("case", CASES)
def test_a_rival_skips_work_and_leaves_no_trace_or_says_why_not(case: str, name: str, dense):
    pipe, latents, work = dense[case]
    rival, scene = RIVALS[name], scene_of(case, pipe)
    why = rival.why_not(scene)
    if (case, name) in NOT_VALID:
        assert why is not None and NOT_VALID[case, name] in why
        return
    if name.startswith("cache_dit") and importlib.util.find_spec("cache_dit") is None:
        pytest.skip("cache-dit is not installed")
    assert why is None
    before = state_of(pipe)
    ratios = {}
    if rival.calibrate is not None:
        ratios = rival.calibrate(scene, lambda: TINY[case].call(pipe, steps=STEPS))
        assert [len(each) for each in ratios.values()] == [STEPS]
    bold, again = BOLD.get(name, rival.ladder[-1]), scene_of(case, pipe, ratios=ratios)
    with counted(pipe, scene.family) as counter, switched_on(rival, bold, again):
        changed = TINY[case].call(pipe, steps=STEPS)
    assert 0 < counter.samples < work
    assert not torch.equal(changed, latents) and torch.isfinite(changed).all()
    assert state_of(pipe) == before
    assert torch.equal(TINY[case].call(pipe, steps=STEPS), latents)


@pytest.mark.parametrize("name", ["first_block_cache", "mag_cache", "taylorseer", "pab", "cache_dit"])
def test_an_exception_in_the_middle_of_a_run_leaves_no_trace(name: str, dense, monkeypatch):
    if name == "cache_dit":
        pytest.importorskip("cache_dit")
    pipe, latents, _ = dense["pixart_sigma"]
    step, calls = pipe.scheduler.step, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of luck")
        return step(*args, **kwargs)

    before = state_of(pipe)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
        patch.setattr(pipe.scheduler, "step", failing)
        scene = scene_of("pixart_sigma", pipe, ratios={"transformer": [1.0] * STEPS})
        with switched_on(RIVALS[name], RIVALS[name].ladder[-1], scene):
            TINY["pixart_sigma"].call(pipe, steps=STEPS)
    assert state_of(pipe) == before
    assert torch.equal(TINY["pixart_sigma"].call(pipe, steps=STEPS), latents)


def test_hooks_of_before_stay(dense):
    pipe, _, work = dense["wan"]
    scene = scene_of("wan", pipe)
    with counted(pipe, scene.family) as outer:
        with switched_on(RIVALS["first_block_cache"], 0.9, scene):
            TINY["wan"].call(pipe, steps=STEPS)
        skipped = outer.samples
        TINY["wan"].call(pipe, steps=STEPS)
    assert skipped < work and outer.samples == skipped + work


def test_two_denoisers_and_pipelines_without_contexts_are_told():
    wan22 = TINY["wan22"].build(layers=2)
    assert "divides them among two" in (RIVALS["mag_cache"].why_not(scene_of("wan22", wan22)) or "")
    assert RIVALS["first_block_cache"].why_not(scene_of("wan22", wan22)) is None
    scene = scene_of("wan22", wan22)

    class Silent(type(wan22)):
        def __call__(self) -> None: ...

    scene.pipe.__class__ = Silent
    assert "opens no cache context" in (RIVALS["first_block_cache"].why_not(scene) or "")
    one_branch = Scene(wan22, scene.family, STEPS, guided=False)
    assert RIVALS["first_block_cache"].why_not(one_branch) is None
    assert RIVALS["fastercache"].why_not(one_branch) is not None


def test_a_start_image_is_no_place_for_seacache():
    assert "start image" in (
        RIVALS["seacache"].why_not(scene_of("wan_i2v", TINY["wan_i2v"].build(layers=1))) or ""
    )


def test_guidance_is_read_from_the_call_or_its_default(dense):
    pipe = dense["wan"][0]
    family = scene_of("wan", pipe).family
    assert guided({"guidance_scale": 5.0}, family, pipe) and guided({}, family, pipe)
    assert not guided({"guidance_scale": 1.0}, family, pipe)


def test_a_missing_peer_is_a_reason(monkeypatch, dense):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in (dbcache.missing() or "")
    assert RIVALS["cache_dit"].why_not(scene_of("wan", dense["wan"][0])) == dbcache.missing()


def test_a_calibration_that_tells_nothing_is_an_error(dense):
    pipe = dense["wan"][0]
    with pytest.raises(DitAccelError, match="printed no ratios"):
        RIVALS["mag_cache"].calibrate(scene_of("wan", pipe), lambda: TINY["wan"].call(pipe, steps=STEPS - 1))


def test_what_is_asked_against_is_read():
    assert [name for name, setting in rivals.read_against("all") if setting is None] == list(rivals.NAMES)
    assert rivals.read_against("none") == []
    read = rivals.read_against("steps:7, cache_dit, first_block_cache:0.07,cache_dit_mask:fast")
    assert read == [
        ("steps", 7),
        ("cache_dit", None),
        ("first_block_cache", 0.07),
        ("cache_dit_mask", "fast"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("teacache", "nearest: "),
        ("", "--against is empty"),
        ("steps:few", "its setting is a number"),
        ("first_block_cache:-1", "a number above 0"),
        ("cache_dit:nan", "a number above 0"),
        ("cache_dit_mask:mild", "one of slow, medium, fast, ultra"),
    ],
)
def test_a_rival_that_nobody_knows_is_refused(text: str, words: str):
    with pytest.raises(BadUsage, match=words):
        rivals.read_against(text)


def test_fewer_steps_are_fewer_and_at_least_one():
    assert rivals.fewer_steps(20) == [16, 13, 11, 9, 7, 5]
    assert rivals.fewer_steps(2) == [1] and rivals.fewer_steps(1) == []


@pytest.mark.parametrize("name", ["first_block_cache", "taylorseer", "cache_dit"])
def test_our_op_serves_what_a_rival_leaves_to_compute(name: str, dense):
    if name == "cache_dit":
        pytest.importorskip("cache_dit")
    pipe, latents, _ = dense["wan"]
    before = state_of(pipe)
    on = switched_on(RIVALS[name], BOLD.get(name, RIVALS[name].ladder[-1]), scene_of("wan", pipe))
    with on, api.accelerated(pipe, dense_through_op()) as handle:
        TINY["wan"].call(pipe, steps=STEPS)
        served = handle.report().counters
    assert set(served) == {"full_auto"} and 0 < served["full_auto"] < 4 * 2 * 2 * LAYERS * STEPS
    assert state_of(pipe) == before and torch.equal(TINY["wan"].call(pipe, steps=STEPS), latents)
