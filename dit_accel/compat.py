"""Every private name of diffusers and torch we touch; tests/test_compat.py has a canary for each."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.hooks import (
    faster_cache,
    first_block_cache,
    group_offloading,
    layerwise_casting,
    mag_cache,
    pyramid_attention_broadcast,
    sea_cache,
    taylorseer_cache,
    text_kv_cache,
)
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager, _set_cache_context
from diffusers.models import attention_dispatch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

ATTENTION_MODULES = (Attention, AttentionModuleMixin)
REGISTRY_ATTRIBUTE = "_diffusers_hook"
RESET_ATTRIBUTE = "_reset_stateful_cache"


class _Nothing(BaseState):
    def reset(self) -> None:
        """A state manager wants a state class; ours only receives the context."""


def context_receiver() -> StateManager:
    """An attribute that `model.cache_context(...)` will write its context to."""
    return StateManager(_Nothing)  # pyright: ignore[reportArgumentType]


def current_context(receiver: StateManager) -> tuple[str, int | None] | None:
    """(branch name, step index or None) of the cache context in force, None outside any."""
    context = receiver._context
    return None if context is None else (context.name, getattr(context, "step_index", None))


def set_cache_context(module: nn.Module, name: str) -> None:
    """Put the hooks under a denoiser into a context, as a pipeline that opens contexts does for each call."""
    _set_cache_context(module, CacheContext(name))


def dispatch_attention(*args: Any, **kwargs: Any) -> Tensor:
    """diffusers' own attention dispatcher, looked up at call time so that its backends can be switched."""
    return attention_dispatch.dispatch_attention_fn(*args, **kwargs)


def ulysses_rank(parallel_config: Any) -> int | None:
    """This process's rank among the head shards, or None where heads are not sharded (ring, none)."""
    context = parallel_config.context_parallel_config
    if context is None or context.ring_degree > 1 or context.ulysses_degree <= 1:
        return None
    return context._ulysses_local_rank


def is_sharded(module: nn.Module) -> bool:
    """Whether ranks split the sequence of this denoiser."""
    config = getattr(module, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None) is not None


def attention_over_shards(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, config: Any,
    attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Run `attend(q, k, v, mask)` on the full sequence with this rank's heads (Ulysses)."""

    def forward_op(_: Any, q: Tensor, k: Tensor, v: Tensor, shard_mask: Tensor | None, *__: Any, **___: Any):
        return attend(q, k, v, shard_mask)

    return attention_dispatch._templated_context_parallel_attention(  # pyright: ignore[reportReturnType]
        query, key, value, mask, 0.0, False, scale, False, False,
        forward_op=forward_op, backward_op=None, _parallel_config=config,
    )  # fmt: skip


_SPLIT_PREFIXES = ("cp_input", "cp_output")


def hook_beneath_shards(registry: Any, hook: Any, name: str) -> None:
    """Register a hook inside of the hooks with which context parallelism splits and gathers tensors."""
    outer = [
        (each, registry.hooks[each]) for each in registry._hook_order if each.startswith(_SPLIT_PREFIXES)
    ]
    for each, _ in outer:
        registry.remove_hook(each, recurse=False)
    registry.register_hook(hook, name)
    for each, split in outer:
        registry.register_hook(split, each)


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """The compiled call that `module.compile()` left, or None."""
    return getattr(module, "_compiled_call_impl", None)


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Put a compiled call on a module, or take it away."""
    module._compiled_call_impl = call  # pyright: ignore[reportAttributeAccessIssue]


def unwrap_compiled(module: nn.Module) -> nn.Module:
    """The module under `torch.compile(module)`."""
    return getattr(module, "_orig_mod", module)


def noise_levels(scheduler: Any, timesteps: Tensor) -> tuple[float, ...]:
    """The noise level in [0, 1] of each timestep: the share of noise in signal plus noise.

    Flow matching: sigma = t / num_train_timesteps. Variance preserving: sqrt(1-a) / (sqrt(1-a) + sqrt(a))
    with a the cumulative alpha, which is the sigma of the flow-matching path at equal signal-to-noise ratio.
    """
    train = scheduler.config.get("num_train_timesteps", 1000)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    values = timesteps.detach().float().cpu()
    if alphas is None or scheduler.config.get("prediction_type") == "flow_prediction":
        return tuple(float(x) for x in (values / train).clamp(0, 1))
    alpha = alphas.float().cpu()[values.round().long().clamp(0, len(alphas) - 1)]
    noise, signal = (1 - alpha).sqrt(), alpha.sqrt()
    return tuple(float(x) for x in noise / (noise + signal))


def installed_versions() -> dict[str, str]:
    """Versions that decide whether the private names above still exist."""
    import diffusers

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}


def decode_unclamped(vae: Any, latents: Tensor) -> Tensor:
    """`decode` of Wan's or Qwen-Image's autoencoder without its clamp, which has no gradient outside."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for index in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, index : index + 1]
        first = {"first_chunk": index == 0} if isinstance(vae, AutoencoderKLWan) else {}
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
    vae.clear_cache()
    return torch.cat(chunks, dim=2)


# hooks with which diffusers' caches stand on a denoiser or on modules inside it -> what the user enabled
CACHE_HOOKS = {
    pyramid_attention_broadcast._PYRAMID_ATTENTION_BROADCAST_HOOK: "PyramidAttentionBroadcast",
    faster_cache._FASTER_CACHE_DENOISER_HOOK: "FasterCache",
    faster_cache._FASTER_CACHE_BLOCK_HOOK: "FasterCache",
    first_block_cache._FBC_LEADER_BLOCK_HOOK: "FirstBlockCache",
    first_block_cache._FBC_BLOCK_HOOK: "FirstBlockCache",
    mag_cache._MAG_CACHE_LEADER_BLOCK_HOOK: "MagCache",
    mag_cache._MAG_CACHE_BLOCK_HOOK: "MagCache",
    taylorseer_cache._TAYLORSEER_CACHE_HOOK: "TaylorSeerCache",
    sea_cache._SEA_CACHE_ROOT_HOOK: "SeaCache",
    sea_cache._SEA_CACHE_LEADER_BLOCK_HOOK: "SeaCache",
    sea_cache._SEA_CACHE_BLOCK_HOOK: "SeaCache",
    sea_cache._SEA_CACHE_POST_NORM_HOOK: "SeaCache",
    text_kv_cache._TEXT_KV_CACHE_TRANSFORMER_HOOK: "TextKVCache",
    text_kv_cache._TEXT_KV_CACHE_BLOCK_HOOK: "TextKVCache",
}
LAYERWISE_CASTING_HOOK = layerwise_casting._LAYERWISE_CASTING_HOOK
GROUP_OFFLOAD_HOOKS = {group_offloading._GROUP_OFFLOADING, group_offloading._LAZY_PREFETCH_GROUP_OFFLOADING}
CACHE_DIT_MARKS = ("_is_cached", "_context_manager")  # cache-dit 1.2 to 1.5 sets them on what it changed


def hook_names(module: nn.Module) -> set[str]:
    """The names of all hooks on a module and on those inside it."""
    registries = (child.__dict__.get(REGISTRY_ATTRIBUTE) for child in module.modules())
    return {name for registry in registries if registry is not None for name in registry.hooks}


def cache_config(module: nn.Module) -> Any:
    """The config that `enable_cache` left on a denoiser, or None."""
    return module.__dict__.get("_cache_config")


def cache_dit_mark(thing: Any) -> str | None:
    """What shows that cache-dit is enabled on this very pipeline or denoiser, or None.

    It also marks the pipeline's class, which says nothing of another pipeline of that class.
    """
    return next((mark for mark in CACHE_DIT_MARKS if getattr(thing, "__dict__", {}).get(mark)), None)


def offloads(module: nn.Module) -> bool:
    """Whether a hook of accelerate on a part of this module moves its weights in and out by itself."""
    hooks = (child.__dict__.get("_hf_hook") for child in module.modules() if child is not module)
    return any(getattr(each, "offload", False) for hook in hooks for each in getattr(hook, "hooks", [hook]))


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written in place; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def is_moved_whole(module: nn.Module) -> bool:
    """Whether a hook of accelerate moves this module between devices as a whole (model offload)."""
    return module.__dict__.get("_hf_hook") is not None
