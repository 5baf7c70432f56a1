"""Model families: one record per file, found by the class name of a denoiser."""

from typing import Any

from dit_accel.families.base import Family
from dit_accel.registry import FAMILIES

__all__ = ["Family", "family_of"]


def family_of(denoiser: Any) -> Family | None:
    """The record that describes this denoiser, or None: unknown models run dense."""
    # torch.compile keeps the model in _orig_mod; FSDP2 and users subclass it, hence the whole MRO
    model = getattr(denoiser, "_orig_mod", denoiser)
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((FAMILIES.get(name) for name in names if name in FAMILIES), None)
