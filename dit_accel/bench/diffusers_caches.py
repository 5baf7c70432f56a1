"""The caches of diffusers, each switched on so that it really works on these pipelines, and off again.

They are given to a denoiser by `apply_...`, not by `enable_cache`, which PixArt's denoiser lacks. What was
switched on, `traces.no_trace` takes off. A new run gets new hooks: no state can pass from run to run.
Checked with diffusers 0.42.1 and 0.41.0.
"""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry
from torch import nn

from dit_accel import compat
from dit_accel.bench.scene import Scene
from dit_accel.bench.traces import no_trace
from dit_accel.errors import DitAccelError

EARLY = 3  # TaylorSeer: steps that are always computed, its default
# attention and feed-forward by the names that these families give them; the default looks for `attn` alone
SUBLAYERS = [r"(transformer_)?blocks\.\d+\.(attn|attn1|attn2|ff|ffn|img_mlp|txt_mlp)"]
TENSORS = {"cogvideox": "BFCHW", "pixart": "BCHW"}  # FasterCache: axes of a denoiser's output
ALL_TIMES = (-1, 1001)


def first_block_cache(scene: Scene, threshold: float) -> None:
    """All blocks but the first are skipped while the first one's residual stays within `threshold`."""
    _apply(scene, hooks.apply_first_block_cache, lambda _: hooks.FirstBlockCacheConfig(threshold=threshold))


def mag_cache(scene: Scene, threshold: float) -> None:
    """All blocks are skipped while the calibrated magnitudes of their residual say that it hardly changes."""

    def config(denoiser: str) -> Any:
        ratios = scene.ratios[denoiser]
        return hooks.MagCacheConfig(
            mag_ratios=list(ratios), num_inference_steps=len(ratios), threshold=threshold
        )

    _apply(scene, hooks.apply_mag_cache, config)


def calibrate_mag_cache(scene: Scene, run: Callable[[], Any]) -> dict[str, list[float]]:
    """The magnitudes that a calibrating run of MagCache prints, which a user pastes into the configuration.

    With guidance in two forwards it prints a list for each branch; the first is the conditional one.
    """
    printed = io.StringIO()
    with no_trace(scene), contextlib.redirect_stdout(printed):
        _apply(
            scene,
            hooks.apply_mag_cache,
            lambda _: hooks.MagCacheConfig(calibrate=True, num_inference_steps=scene.steps),
        )
        run()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    lists: list[list[float]] = [json.loads(line) for line in lines]
    if not lists:
        raise DitAccelError(
            f"asked MagCache to calibrate over {scene.steps} steps; it printed no ratios, so its hooks saw "
            "another number of steps. Use a scheduler with one forward a step, or leave mag_cache out."
        )
    return dict.fromkeys(scene.denoisers, lists[0])


def taylorseer(scene: Scene, interval: int) -> None:
    """Every `interval`-th step is computed; between, the last projection is forecast (its lite mode)."""
    _apply(scene, hooks.apply_taylorseer_cache, lambda _: _taylor(interval, use_lite_mode=True))


def taylorseer_sublayers(scene: Scene, interval: int) -> None:
    """Every `interval`-th step is computed; between, each attention and feed-forward output is forecast."""
    _apply(scene, hooks.apply_taylorseer_cache, lambda _: _taylor(interval, cache_identifiers=SUBLAYERS))


def _taylor(interval: int, **more: Any) -> Any:
    # the default stores factors in bfloat16, which would be charged to the forecast
    return hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=EARLY,
        taylor_factors_dtype=torch.float32,
        **more,
    )


def seacache(scene: Scene, threshold: float) -> None:
    """All blocks are skipped while the filtered latents' accumulated change stays below `threshold`."""
    _apply(scene, hooks.apply_sea_cache, lambda _: hooks.SeaCacheConfig(threshold=threshold))


def pab(scene: Scene, period: int) -> None:
    """Self-attention is computed every `period`-th step and cross-attention every second of those."""
    for denoiser in scene.denoisers.values():
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=period,
            cross_attention_block_skip_range=2 * period,
            spatial_attention_timestep_skip_range=(100, 900),
            cross_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=_timestep(scene, denoiser),
        )
        hooks.apply_pyramid_attention_broadcast(denoiser, config)
    _announce(scene)


def fastercache(scene: Scene, period: int) -> None:
    """The unconditional branch is computed every `period`-th step, and attention every second one."""
    for denoiser in scene.denoisers.values():
        config = hooks.FasterCacheConfig(
            spatial_attention_timestep_skip_range=ALL_TIMES,
            unconditional_batch_skip_range=period,
            unconditional_batch_timestep_skip_range=(-1, 900),
            attention_weight_callback=lambda _: 0.3,
            tensor_format=TENSORS[scene.family.name],
            current_timestep_callback=_timestep(scene, denoiser),
        )
        hooks.apply_faster_cache(denoiser, config)
    _announce(scene)


def _apply(scene: Scene, apply: Callable[[Any, Any], None], config: Callable[[str], Any]) -> None:
    for name, denoiser in scene.denoisers.items():
        apply(denoiser, config(name))
    _announce(scene)


def _announce(scene: Scene) -> None:
    """Let the pipeline's contexts reach the new hooks; where it opens none, open one for the whole run."""
    for denoiser in scene.denoisers.values():
        HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
        if not scene.opens_contexts:
            compat.set_cache_context(denoiser, "default")


def _timestep(scene: Scene, denoiser: nn.Module) -> Callable[[], Any]:
    """The timestep of the forward in progress, read from its arguments: not every pipeline tells it."""
    seen: list[float] = []

    def record(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        seen[:] = [float(torch.as_tensor(kwargs["timestep"]).flatten()[0])]

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    scene.undo.callback(handle.remove)
    return lambda: seen[0]
