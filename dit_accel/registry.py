"""The two tables of names: methods by the word a recipe uses, families by the class of the denoiser.

A literal table, not decorators or package walking: it can be read, searched and type-checked, it
imports nothing, and it has one order. An entry is "module:Object" and is imported on first use.
Third parties call `register_method` and `register_family`, which make the same checks.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

from dit_accel.errors import DitAccelError, nearest

SEAMS = frozenset({"attention", "timeline"})
FAMILY_ATTRIBUTES = (
    *(
        "name",
        "transformers",
        "blocks",
        "self_attention",
        "cross_attention",
        "sublayers",
        "streams",
        "returns",
    ),
    *("token_order", "guidance", "grid", "references", "unbatched", "output", "guidance_argument", "fps"),
)
TOKEN_ORDERS = ("visual", "text,visual", "visual,text")
GUIDANCE = ("sequential", "batched")


class Registry:
    """A table name -> object that imports an entry when it is first asked for."""

    def __init__(self, kind: str, table: dict[str, str], check: Callable[[str, Any], None]):
        self.kind = kind
        self._paths = dict(table)
        self._objects: dict[str, Any] = {}
        self._check = check

    def names(self) -> tuple[str, ...]:
        """Every known name, built-in ones first."""
        return (*self._paths, *(name for name in self._objects if name not in self._paths))

    def __contains__(self, name: object) -> bool:
        return name in self._objects or name in self._paths

    def get(self, name: str) -> Any:
        """The object behind a name; imports its module the first time."""
        if name not in self:
            raise DitAccelError(
                f'no {self.kind} is called "{name}"; known: {nearest(name, self.names())}. '
                f"Correct the name, or register your own with dit_accel.register_{self.kind}."
            )
        if name not in self._objects:
            value = self._load(name)
            self._check(name, value)
            self._objects[name] = value
        return self._objects[name]

    def add(self, name: str, value: Any) -> None:
        """Enter an object that passes the checks; entering the same object again changes nothing."""
        self._check(name, value)
        if name in self:
            found = self.get(name)
            if found is value:
                return
            raise DitAccelError(
                f'cannot register {self.kind} "{name}" as {value!r}: that name is taken by {found!r}. '
                f"Choose another name."
            )
        self._objects[name] = value

    def _load(self, name: str) -> Any:
        module, _, attribute = self._paths[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise DitAccelError(
                f'{self.kind} "{name}" is listed as {module}:{attribute}, which cannot be imported: {error}. '
                f"Install what is missing, or use another {self.kind}."
            ) from error


def _require(condition: bool, kind: str, name: str, found: str, advice: str) -> None:
    if not condition:
        raise DitAccelError(f'cannot register {kind} "{name}": {found}. {advice}')


def _check_method(name: str, cls: Any) -> None:
    def require(condition: bool, found: str, advice: str) -> None:
        _require(condition, "method", name, found, advice)

    require(
        re.fullmatch("[a-z][a-z0-9_]*", str(name)) is not None,
        "the name is not a lower-case word",
        "Recipes name methods in lower case with underscores, such as share_branch.",
    )
    frozen = dataclasses.is_dataclass(cls) and getattr(cls, "__dataclass_params__").frozen  # noqa: B009
    require(
        isinstance(cls, type) and frozen,
        f"{cls!r} is not a frozen dataclass",
        "Its fields are the recipe's parameters, and it holds no state: use @dataclass(frozen=True).",
    )
    seams = cast("frozenset[str] | None", getattr(cls, "seams", None))
    require(
        isinstance(seams, frozenset) and bool(seams) and seams <= SEAMS,
        f"seams is {seams!r}",
        f'Add the class attribute seams = frozenset({{"attention"}}), a part of {sorted(SEAMS)}.',
    )


def _check_family(name: str, family: Any) -> None:
    def require(condition: bool, found: str, advice: str) -> None:
        _require(condition, "family", name, found, advice)

    missing = [attribute for attribute in FAMILY_ATTRIBUTES if not hasattr(family, attribute)]
    require(
        not missing,
        f"{family!r} has no {', '.join(missing)}",
        "Build it with dit_accel.families.base.Family.",
    )
    require(
        re.fullmatch("[a-z][a-z0-9_]*", family.name) is not None,
        f"its own name is {family.name!r}",
        "Family names are lower-case words, such as qwen_image.",
    )
    require(
        name in family.transformers,
        f"its denoiser classes are {', '.join(family.transformers) or 'none'}",
        "A family is found by the exact class name of the denoiser: list it in transformers.",
    )
    for attribute, allowed in (("token_order", TOKEN_ORDERS), ("guidance", GUIDANCE)):
        value = getattr(family, attribute)
        require(value in allowed, f"{attribute} is {value!r}", f"Use one of: {'; '.join(allowed)}.")
    require(callable(family.grid), f"grid is {family.grid!r}", "It must be a function of (config, kwargs).")


class _Families(Registry):
    def family_names(self) -> tuple[str, ...]:
        """The distinct family names, in table order."""
        return tuple(dict.fromkeys(self.get(name).name for name in self.names()))


METHODS = Registry(
    "method",
    {
        "full": "dit_accel.methods.attention.full:Full",
        "window": "dit_accel.methods.attention.window:Window",
        "arrow": "dit_accel.methods.attention.arrow:Arrow",
        "brick": "dit_accel.methods.attention.brick:Brick",
        "coreset": "dit_accel.methods.attention.coreset:Coreset",
        "tail": "dit_accel.methods.attention.tail:Tail",
        "residual": "dit_accel.methods.attention.residual:Residual",
        "reuse": "dit_accel.methods.reuse.reuse:Reuse",
        "share_branch": "dit_accel.methods.reuse.share_branch:ShareBranch",
        "forecast": "dit_accel.methods.reuse.forecast:Forecast",
        "fitted": "dit_accel.methods.reuse.fitted:Fitted",
        "skip": "dit_accel.methods.reuse.skip:Skip",
        "compute": "dit_accel.methods.reuse.compute:Compute",
    },
    _check_method,
)

FAMILIES = _Families(
    "family",
    {
        "WanTransformer3DModel": "dit_accel.families.wan:WAN",
        "CogVideoXTransformer3DModel": "dit_accel.families.cogvideox:COGVIDEOX",
        "PixArtTransformer2DModel": "dit_accel.families.pixart:PIXART",
        "QwenImageTransformer2DModel": "dit_accel.families.qwen_image:QWEN_IMAGE",
    },
    _check_family,
)


def register_method(name: str, cls: type) -> None:
    """Make a method usable in recipes: a frozen dataclass whose fields are its parameters."""
    METHODS.add(name, cls)


def register_family(family: Any) -> None:
    """Make a model family known by the class names of its denoisers; all of them or none."""
    classes: Iterable[str] = getattr(family, "transformers", ())
    _require(
        bool(classes),
        "family",
        getattr(family, "name", "?"),
        "transformers is empty",
        "List the class names of its denoisers.",
    )
    for name in classes:
        _check_family(name, family)
        if name in FAMILIES and FAMILIES.get(name) is not family:
            raise DitAccelError(
                f'cannot register family "{family.name}": the denoiser class {name} belongs to family '
                f'"{FAMILIES.get(name).name}". Remove the class from transformers.'
            )
    for name in classes:
        FAMILIES.add(name, family)
