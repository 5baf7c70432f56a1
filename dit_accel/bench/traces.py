"""A pipeline as it was, whatever was switched on in between and wherever that stopped."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

from dit_accel import compat
from dit_accel.bench.scene import Scene
from dit_accel.install import drop_empty_registries

FORWARD = "forward"  # in a module's own dictionary: what replaces the forward of its class


@contextmanager
def no_trace(scene: Scene) -> Iterator[None]:
    """Hooks, replaced forwards and attributes of the pipeline's class that came inside are taken off."""
    denoisers = list(scene.denoisers.values())
    modules = [each for denoiser in denoisers for each in denoiser.modules()]
    before = [(each, _hooks(each), each.__dict__.get(FORWARD)) for each in modules]
    kind, attributes = type(scene.pipe), dict(vars(type(scene.pipe)))
    try:
        with scene.undo:
            yield
    finally:
        for module, hooks, forward in before:
            for name in reversed([each for each in _hooks(module) if each not in hooks]):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
            _put_back(module, forward)
        for denoiser in denoisers:
            HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
            drop_empty_registries(denoiser)
        _restore_class(kind, attributes)


def _hooks(module: nn.Module) -> tuple[str, ...]:
    registry = module.__dict__.get(compat.REGISTRY_ATTRIBUTE)
    return tuple(registry.hooks) if registry is not None else ()


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is not None:
        module.forward = forward
    else:
        module.__dict__.pop(FORWARD, None)


def _restore_class(kind: type, attributes: dict[str, Any]) -> None:
    for name in set(vars(kind)) - set(attributes):
        delattr(kind, name)
    for name, value in attributes.items():
        if vars(kind)[name] is not value:
            setattr(kind, name, value)
