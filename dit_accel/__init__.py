"""dit_accel: several times faster diffusers transformer pipelines, with the cost stated."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.api import Handle, accelerate, accelerated, compile, report, restore
    from dit_accel.recipe import Recipe
    from dit_accel.registry import register_family, register_method
    from dit_accel.run_report import Report

# name -> module: loaded when first asked for, so that `import dit_accel` and the command's --help stay quick
_WHERE = {
    **dict.fromkeys(("Handle", "accelerate", "accelerated", "compile", "report", "restore"), "dit_accel.api"),
    "Recipe": "dit_accel.recipe",
    "Report": "dit_accel.run_report",
    "register_family": "dit_accel.registry",
    "register_method": "dit_accel.registry",
}

__all__ = [
    "Handle",
    "Recipe",
    "Report",
    "accelerate",
    "accelerated",
    "compile",
    "register_family",
    "register_method",
    "report",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
