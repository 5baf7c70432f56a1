"""From a choice to an instance of its method: parameters checked against the dataclass's fields."""

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from dit_accel.errors import DitAccelError, RecipeError, nearest
from dit_accel.recipe_parse import Choice, Places, shown
from dit_accel.registry import METHODS


def build_method(choice: Choice, places: Places) -> Any:
    """The method with its parameters, or a RecipeError at the parameter's line."""
    path = ("choices", choice.letter)
    where = f"[choices] {choice.letter}: {choice.method}"
    try:
        cls = METHODS.get(choice.method)
    except DitAccelError as error:
        raise RecipeError(f"{places.where(*path)}: [choices] {choice.letter}: {error}") from error
    hints = typing.get_type_hints(cls)
    known = {each.name: each for each in dataclasses.fields(cls) if each.init}
    for name, value in choice.parameters.items():
        if name not in known:
            places.fail(
                (*path, name),
                f'{where} has no parameter "{name}"; nearest: {nearest(name, known)}. Correct or remove it.',
            )
        if not fits(value, hints[name]):
            places.fail(
                (*path, name),
                f"{where} needs {name} to be {spell(hints[name])}; found {shown(value)}. Correct it.",
            )
    nothing = dataclasses.MISSING
    for name, each in known.items():
        if name not in choice.parameters and each.default is nothing and each.default_factory is nothing:
            places.fail(path, f"{where} needs the parameter {name}: {spell(hints[name])}. Add it.")
    try:
        return cls(**{name: _as(value, hints[name]) for name, value in choice.parameters.items()})
    except (ValueError, TypeError, DitAccelError) as error:
        raise RecipeError(f"{places.where(*path)}: {where}: {error}") from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value may stand for a field of this type; whole numbers pass as floats."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else False


def _as(value: Any, hint: Any) -> Any:
    """The value in the field's own type: lists as tuples, whole numbers as floats where floats are meant."""
    inner = typing.get_args(hint)
    if hint is float:
        return float(value)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return _as(value, next(each for each in inner if fits(value, each)))
    if isinstance(value, list | tuple):
        hints = (
            inner
            if len(inner) == len(value) and Ellipsis not in inner
            else (*inner[:1], Any)[:1] * len(value)
        )
        return tuple(map(_as, value, hints))
    return value


def spell(hint: Any) -> str:
    """A field's type in the words of a recipe."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(spell(each) for each in inner if each is not type(None))
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"a list, each {spell(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {spell(inner[0])}" if len(set(inner)) == 1 else "a list"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
