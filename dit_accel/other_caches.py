"""Caches of others on a pipeline: diffusers' own and cache-dit. We refuse to stand on top of one.

Two caches that each skip work neither see nor report what the other skipped, and a stored output would be
one that the other made up. A recipe that computes everything, if by another backend, may stand there.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from dit_accel import compat
from dit_accel.errors import OtherCache

_APPLIED = (
    "HookRegistry.check_if_exists_or_initialize({at}).remove_hook(name, recurse=True) for each of {hooks}"
)
# cache-dit 1.5 fails to undo itself on a denoiser that had a hook before it, ours or another's
_CACHE_DIT = "cache_dit.disable_cache(pipe) (if that fails, load the pipeline anew)"


def refuse(pipe: Any, denoisers: Mapping[str, nn.Module]) -> None:
    """Raise OtherCache where the pipeline or one of its denoisers has a cache enabled."""
    mark = compat.cache_dit_mark(pipe)
    if mark is not None:
        _fail("cache-dit", f"its {mark} is on the pipeline", _CACHE_DIT)
    for name, module in denoisers.items():
        refuse_enabled(name, module)
        hooks = sorted(compat.hook_names(module) & set(compat.CACHE_HOOKS))
        if hooks:
            found = " and ".join(dict.fromkeys(compat.CACHE_HOOKS[hook] for hook in hooks))
            _fail(
                f"diffusers' {found}",
                f"hooks {', '.join(hooks)} in {name}",
                _APPLIED.format(at=f"pipe.{name}", hooks=", ".join(map(repr, hooks))),
            )


def refuse_enabled(name: str, module: nn.Module) -> None:
    """The part of `refuse` that costs next to nothing: marks on the denoiser itself."""
    config = compat.cache_config(module)
    if config is not None:
        what = type(config).__name__.removesuffix("Config")
        _fail(f"diffusers' {what}", f"enable_cache was called on {name}", f"pipe.{name}.disable_cache()")
    mark = compat.cache_dit_mark(module)
    if mark is not None:
        _fail("cache-dit", f"its {mark} is on {name}", _CACHE_DIT)


def _fail(cache: str, found: str, remedy: str) -> None:
    raise OtherCache(
        f"a recipe was asked to run, but {cache} is enabled ({found}); the two do not stack. "
        f"Disable it with {remedy}, or call dit_accel.restore(pipe) and use that cache alone."
    )
