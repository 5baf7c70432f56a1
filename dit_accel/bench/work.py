"""How much of a denoiser really ran: sublayers counted beneath whatever is switched on above them.

A cache that is accepted and does nothing, or a row that is fast for another reason, shows here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dit_accel.families import Family
from dit_accel.install import drop_empty_registries
from dit_accel.inventory import child_of, describe

HOOK = "dit_accel_bench_count"


@dataclass
class Work:
    """Samples that the sublayers of all blocks computed: two for a batch of two."""

    samples: int = 0


class _Counting(ModelHook):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        self.work.samples += len(tensors[0]) if tensors else 1
        return args, kwargs


def denoisers_of(pipe: Any, family: Family) -> dict[str, nn.Module]:
    """The denoisers that this pipeline holds, by attribute."""
    found = {name: getattr(pipe, name, None) for name in family.denoisers}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


@contextmanager
def counted(pipe: Any, family: Family) -> Iterator[Work]:
    """Count the sublayers that run inside; enter it before anything that skips them is switched on."""
    work, denoisers = Work(), denoisers_of(pipe, family)
    sublayers = [layer for name, module in denoisers.items() for layer in _sublayers(name, module, family)]
    for layer in sublayers:
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(_Counting(work), HOOK)
    try:
        yield work
    finally:
        for layer in sublayers:
            HookRegistry.check_if_exists_or_initialize(layer).remove_hook(HOOK, recurse=False)
        for module in denoisers.values():
            drop_empty_registries(module)


def _sublayers(name: str, module: nn.Module, family: Family) -> Sequence[nn.Module]:
    paths = [
        f"{block}.{layer}" for block in describe(name, module, family).blocks for layer in family.sublayers
    ]
    return [child for path in paths if (child := child_of(module, path)) is not None]
