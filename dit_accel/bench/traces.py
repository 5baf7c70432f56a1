"""A pipeline as it was, whatever was switched on in between and wherever that stopped."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.hooks import HookRegistry
from torch import nn

from dit_accel import compat
from dit_accel.bench.scene import Scene
from dit_accel.install import drop_empty_registries


@contextmanager
def no_trace(scene: Scene) -> Iterator[None]:
    """What is registered inside is taken off afterwards, by the scene's `undo` or by comparing the hooks."""
    denoisers = list(scene.denoisers.values())
    before = [(each, _hooks(each)) for denoiser in denoisers for each in denoiser.modules()]
    try:
        with scene.undo:
            yield
    finally:
        for module, hooks in before:
            for name in reversed([each for each in _hooks(module) if each not in hooks]):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
        for denoiser in denoisers:
            HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
            drop_empty_registries(denoiser)


def _hooks(module: nn.Module) -> tuple[str, ...]:
    registry = module.__dict__.get(compat.REGISTRY_ATTRIBUTE)
    return tuple(registry.hooks) if registry is not None else ()
