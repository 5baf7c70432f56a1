"""Caches of diffusers and cache-dit: refused before and after, by name, with nothing half-patched."""

import pytest
import torch
from contract.rows import build, fresh, plain, recipe, run
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, apply_first_block_cache, apply_taylorseer_cache
from diffusers.hooks.sea_cache import SeaCacheConfig
from diffusers.hooks.text_kv_cache import TextKVCacheConfig

import dit_accel
from dit_accel import compat
from dit_accel.errors import OtherCache

CONFIGS = {
    "FasterCache": lambda pipe: FasterCacheConfig(current_timestep_callback=lambda: 1),
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda pipe: MagCacheConfig(mag_ratios=torch.ones(9), num_inference_steps=9),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
    ),
    "TaylorSeerCache": lambda pipe: TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn1"]),
    "SeaCache": lambda pipe: SeaCacheConfig(),
    "TextKVCache": lambda pipe: TextKVCacheConfig(),
}


def traces(pipe) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_enabled_cache_is_refused_by_name(name: str):
    pipe = build("wan")
    pipe.transformer.enable_cache(CONFIGS[name](pipe))
    before = traces(pipe)
    with pytest.raises(OtherCache, match=rf"{name}.*transformer\.disable_cache\(\)"):
        dit_accel.accelerate(pipe, recipe("window", "wan"))
    assert traces(pipe) == before
    pipe.transformer.disable_cache()
    with dit_accel.accelerated(pipe, "neutral"):
        assert torch.equal(run(pipe, "wan"), plain("wan"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_enabled_later_is_refused_at_the_next_forward(name: str):
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    expected = run(pipe, "wan")
    pipe.transformer.enable_cache(CONFIGS[name](pipe))
    with pytest.raises(OtherCache, match=name):
        run(pipe, "wan")
    pipe.transformer.disable_cache()
    assert torch.equal(run(pipe, "wan"), expected)
    handle.restore()
    assert torch.equal(run(pipe, "wan"), plain("wan"))


def test_hooks_without_a_config_are_found_and_can_be_removed_as_told():
    for case, apply in (
        ("pixart_sigma", lambda model: apply_first_block_cache(model, FirstBlockCacheConfig())),
        ("wan", lambda model: apply_taylorseer_cache(model, CONFIGS["TaylorSeerCache"](None))),
    ):
        pipe = build(case)
        apply(pipe.transformer)
        with pytest.raises(OtherCache, match="remove_hook") as raised:
            dit_accel.accelerate(pipe, recipe("window", case))
        for hook in compat.hook_names(pipe.transformer):
            assert hook in str(raised.value)
            HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook(hook, recurse=True)
        with dit_accel.accelerated(pipe, "neutral"):
            assert torch.equal(run(pipe, case), plain(case))
        with dit_accel.accelerated(pipe, recipe("window", case)):
            run(pipe, case)
            apply(pipe.transformer)
            with pytest.raises(OtherCache):
                run(pipe, case)


def test_a_recipe_that_computes_everything_may_stand_on_a_cache():
    pipe = build("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    alone = run(pipe, "wan")
    with dit_accel.accelerated(pipe, "neutral"):
        assert torch.equal(run(pipe, "wan"), alone)


class Named:
    """Stands for cache-dit's context manager, which the mark holds."""


@pytest.mark.parametrize("mark", compat.CACHE_DIT_MARKS)
def test_marks_of_cache_dit_are_refused(mark: str):
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    setattr(pipe.transformer, mark, Named())
    with pytest.raises(OtherCache, match=r"cache_dit\.disable_cache"):
        run(pipe, "wan")
    handle.restore()
    with pytest.raises(OtherCache, match="cache-dit"):
        dit_accel.accelerate(pipe, recipe("window", "wan"))
    delattr(pipe.transformer, mark)
    with dit_accel.accelerated(pipe, "neutral"):
        assert torch.equal(run(pipe, "wan"), plain("wan"))


def test_cache_dit_itself_is_refused_and_released(monkeypatch):
    cache_dit = pytest.importorskip("cache_dit")
    pipe, other = build("wan"), build("wan")
    cache_dit.enable_cache(pipe)
    with pytest.raises(OtherCache, match="cache-dit"):
        dit_accel.accelerate(pipe, recipe("window", "wan"))
    dit_accel.accelerate(other, "neutral").restore()  # its mark on the class says nothing of this one
    cache_dit.disable_cache(pipe)
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    assert torch.equal(run(pipe, "wan"), fresh("window", "wan")[0])
    monkeypatch.setattr(type(pipe), "__call__", type(pipe).__call__)  # theirs goes with the test
    cache_dit.enable_cache(pipe)
    with pytest.raises(OtherCache, match="cache-dit"):
        run(pipe, "wan")
    handle.restore()
    del type(pipe)._is_cached
