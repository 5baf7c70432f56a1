"""Which sites a denoiser has, read from its modules; changes nothing."""

from typing import Any

from torch import nn

from dit_accel import compat
from dit_accel.sites import Denoiser


def describe(component: str, module: nn.Module, family: Any) -> Denoiser:
    """The sites of one denoiser, read from its modules."""
    blocks = tuple(f"{name}.{i}" for name in family.blocks for i in range(len(module.get_submodule(name))))  # pyright: ignore
    sites: dict[str, dict[str, int]] = {"self": {}, "cross": {}}
    for block in blocks:
        for kind, names in (("self", family.self_attention), ("cross", family.cross_attention)):
            for name in names:
                attention = child_of(module, f"{block}.{name}")
                if isinstance(attention, compat.ATTENTION_MODULES):
                    sites[kind][f"{block}.{name}"] = int(attention.heads)  # pyright: ignore
    paths = [f"{block}.{name}" for block in blocks for name in family.sublayers]
    others = [
        path
        for path in paths
        if path not in sites["self"] | sites["cross"] and child_of(module, path) is not None
    ]
    return Denoiser(component, sites["self"], sites["cross"], blocks, tuple(others))


def child_of(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path, or None where a block has none of that name."""
    try:
        child = module.get_submodule(path)
    except AttributeError:
        return None
    return child if isinstance(child, nn.Module) else None
