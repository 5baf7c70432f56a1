"""A canary for every private name that `compat` touches: the first to fail after an upgrade."""

import inspect
import re

import accelerate.hooks
import diffusers.hooks
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading
from diffusers.hooks.hooks import StateManager
from diffusers.models import attention_dispatch
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from dit_accel import compat
from dit_accel.testing import TINY


class Stateful(ModelHook):
    _is_stateful = True

    def __init__(self):
        super().__init__()
        self.receiver = compat.context_receiver()
        self.seen, self.resets = [], 0

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(compat.current_context(self.receiver))
        return args, kwargs

    def reset_state(self, module):
        self.resets += 1
        return module


class Replacing(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.fixture
def hooked():
    pipe = TINY["wan"].build(layers=1)
    hook = Stateful()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(hook, "canary")
    return pipe, hook


def test_a_state_manager_receives_branch_and_step(hooked):
    pipe, hook = hooked
    TINY["wan"].call(pipe, steps=2)
    assert hook.seen == [("cond", 0), ("uncond", 0), ("cond", 1), ("uncond", 1)]


def test_outside_a_context_there_is_none(hooked):
    pipe, hook = hooked
    assert compat.current_context(hook.receiver) is None
    with pipe.transformer.cache_context("cond"):
        assert compat.current_context(hook.receiver) == ("cond", None)
    assert compat.current_context(hook.receiver) is None


def test_the_receiver_is_what_diffusers_looks_for():
    assert isinstance(compat.context_receiver(), StateManager)
    assert "_context" in vars(compat.context_receiver())


def test_a_pipeline_resets_its_components_when_a_call_ends(hooked):
    pipe, hook = hooked
    TINY["wan"].call(pipe, steps=1)
    assert hook.resets == 1
    assert hasattr(pipe.transformer, compat.RESET_ATTRIBUTE)


def test_the_end_of_a_call_reaches_a_component_by_the_attribute_alone():
    """PixArt has no such method; an attribute of that name on the instance is called."""
    pipe, calls = TINY["pixart_sigma"].build(layers=1), []
    assert not hasattr(pipe.transformer, compat.RESET_ATTRIBUTE)
    pipe.transformer.__dict__[compat.RESET_ATTRIBUTE] = lambda *_, **__: calls.append(1)
    TINY["pixart_sigma"].call(pipe, steps=1)
    assert calls == [1]


def test_the_registry_lives_in_its_attribute_and_forgets_its_children(hooked):
    pipe, _ = hooked
    registry = pipe.transformer.__dict__[compat.REGISTRY_ATTRIBUTE]
    assert isinstance(registry, HookRegistry) and list(registry.hooks) == ["canary"]
    registry.invalidate_child_registries_cache()


def test_a_hook_shows_the_forward_beneath_it(hooked):
    pipe, hook = hooked
    assert callable(hook.fn_ref.forward) and hook.fn_ref.original_forward is None  # it replaces nothing
    replacing = Replacing()
    pipe.transformer._diffusers_hook.register_hook(replacing, "replacing")
    assert replacing.fn_ref.original_forward is not None


@pytest.mark.parametrize("case", ["wan", "cogvideox", "pixart_sigma", "qwen_image"])
def test_attention_modules_are_of_the_two_classes_and_know_their_heads(case: str):
    modules = [m for m in TINY[case].build(layers=1).transformer.modules() if hasattr(m, "processor")]
    assert modules
    assert all(isinstance(m, compat.ATTENTION_MODULES) and int(m.heads) == 4 for m in modules)


def test_the_dispatcher_is_found_at_call_time(monkeypatch: pytest.MonkeyPatch):
    q = torch.randn(1, 5, 2, 4)
    assert compat.dispatch_attention(q, q, q).shape == q.shape
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda *args, **kwargs: "ours")
    assert compat.dispatch_attention(q, q, q) == "ours"


def test_the_dispatcher_takes_what_a_twin_passes_on():
    names = inspect.signature(attention_dispatch.dispatch_attention_fn).parameters
    assert {
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa",
        "attention_kwargs", "backend", "parallel_config",
    } <= set(names)  # fmt: skip


def test_context_parallel_attention_takes_a_forward_op():
    names = list(inspect.signature(attention_dispatch._templated_context_parallel_attention).parameters)
    assert names[:9] == [
        "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "return_lse",
    ]  # fmt: skip
    assert {"forward_op", "backward_op", "_parallel_config"} <= set(names)


def test_a_parallel_config_tells_its_rank():
    from diffusers import ContextParallelConfig

    fields = ContextParallelConfig.__dataclass_fields__
    assert {"ring_degree", "ulysses_degree", "_ulysses_local_rank"} <= set(fields)


def test_a_compiled_call_is_read_set_and_used():
    module = nn.Identity()
    assert compat.compiled_call(module) is None
    module.compile(backend="eager")
    assert compat.compiled_call(module) is not None
    compat.set_compiled_call(module, lambda x: x + 1)
    assert module(1) == 2
    compat.set_compiled_call(module, None)
    assert module(1) == 1


def test_a_compiled_module_keeps_the_original():
    module = nn.Identity()
    assert compat.unwrap_compiled(torch.compile(module, backend="eager")) is module
    assert compat.unwrap_compiled(module) is module


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    ],
)
def test_noise_levels_of_flow_matching_are_its_sigmas(scheduler):
    scheduler.set_timesteps(9)
    levels = compat.noise_levels(scheduler, scheduler.timesteps)
    expected = scheduler.sigmas[:-1].clamp(0, 1).tolist()
    assert levels == pytest.approx(expected, abs=2e-3)  # UniPC rounds its timesteps to whole numbers


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler(), DPMSolverMultistepScheduler()])
def test_noise_levels_of_variance_preserving_schedules(scheduler):
    scheduler.set_timesteps(9)
    levels = compat.noise_levels(scheduler, scheduler.timesteps)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    assert levels == pytest.approx(
        ((1 - alpha).sqrt() / ((1 - alpha).sqrt() + alpha.sqrt())).tolist(), abs=1e-5
    )
    assert list(levels) == sorted(levels, reverse=True) and 0 <= levels[-1] < levels[0] <= 1


def test_the_versions_are_named():
    assert set(compat.installed_versions()) == {"torch", "diffusers"}


def test_every_cache_of_diffusers_stands_on_hooks_we_know():
    """A cache that hooks under another name, or a new one that `enable_cache` takes, would not be refused."""
    made = inspect.getsource(CacheMixin.disable_cache)
    removed = set(re.findall(r"remove_hook\((_\w+)", made))
    known = {
        name
        for module in vars(diffusers.hooks).values()
        if inspect.ismodule(module)
        for name, value in vars(module).items()
        if name.endswith("_HOOK") and value in compat.CACHE_HOOKS
    }
    assert removed and removed <= known


def test_enable_cache_leaves_its_config():
    pipe = TINY["wan"].build(layers=2)
    assert compat.cache_config(pipe.transformer) is None
    config = FirstBlockCacheConfig()
    pipe.transformer.enable_cache(config)
    assert compat.cache_config(pipe.transformer) is config
    assert {"fbc_leader_block_hook"} <= compat.hook_names(pipe.transformer)
    pipe.transformer.disable_cache()
    assert compat.cache_config(pipe.transformer) is None and not compat.hook_names(pipe.transformer)


def test_offloading_and_casting_show_by_their_hooks():
    cpu = torch.device("cpu")
    for change, names in (
        (
            lambda m: apply_group_offloading(m, cpu, cpu, offload_type="leaf_level"),
            compat.GROUP_OFFLOAD_HOOKS,
        ),
        (
            lambda m: m.enable_layerwise_casting(torch.bfloat16, torch.float32),
            {compat.LAYERWISE_CASTING_HOOK},
        ),
    ):
        model = TINY["wan"].build(layers=1).transformer
        assert not compat.hook_names(model) & names
        change(model)
        assert compat.hook_names(model) & names


def test_hooks_of_accelerate_show_on_the_module():
    model = TINY["wan"].build(layers=1).transformer
    assert not compat.is_moved_whole(model) and not compat.offloads(model)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.CpuOffload("cpu"))
    assert compat.is_moved_whole(model) and not compat.offloads(model)
    leaf = model.blocks[0].attn1.to_q
    accelerate.hooks.add_hook_to_module(leaf, accelerate.hooks.AlignDevicesHook("cpu", offload=True))
    assert compat.offloads(model)


def test_a_tensor_counts_its_writes_but_for_inference():
    tensor = torch.zeros(2)
    before = compat.version_of(tensor)
    tensor.add_(1)
    assert before is not None and compat.version_of(tensor) == before + 1
    with torch.inference_mode():
        assert compat.version_of(torch.zeros(2)) is None


def test_a_context_can_be_set_from_outside(hooked):
    pipe, hook = hooked
    compat.set_cache_context(pipe.transformer, "default")
    assert compat.current_context(hook.receiver) == ("default", None)
