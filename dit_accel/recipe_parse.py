"""From the tables of a recipe to its typed fields: unknown keys and wrong types end here.

What the values mean together (lengths, letters, order) is checked by `recipe_check`, which also
sees recipes that were built in code.
"""

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from dit_accel.errors import RecipeError, nearest
from dit_accel.recipe_toml import Lines

AUTO = "auto"
MAX_DEPTH = 8  # of lists and tables inside [made_by] and method parameters


@dataclass(frozen=True)
class Choice:
    """A letter of the picture: a method and its parameters."""

    letter: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MadeFor:
    """What a recipe was searched on; anything else is mapped and reported by the plan."""

    family: str | None = None
    model: str | None = None
    steps: int | None = None
    grid: tuple[int, int, int] | None = None  # visual tokens: frames, rows, columns
    scheduler: str | None = None
    branches: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ExactTables:
    """What is computed once instead of at every step, with equal bits; "auto" is where it pays."""

    modulation: bool | str = AUTO  # rows of the modulation projections, by the bits of the timestep
    text_kv: bool | str = AUTO  # keys and values of cross-attention, by prompt and branch


@dataclass(frozen=True)
class Places:
    """Where a recipe came from: turns a path of keys into "file:line"."""

    source: str
    lines: Lines = field(default_factory=dict)

    def where(self, *path: str) -> str:
        """ "file:line" of the key, or of the nearest table around it; the file alone if it has no lines."""
        if not self.lines:
            return self.source
        known = (path[:length] for length in range(len(path), 0, -1))
        return f"{self.source}:{next((self.lines[key] for key in known if key in self.lines), 1)}"

    def fail(self, path: tuple[str, ...], message: str) -> NoReturn:
        raise RecipeError(f"{self.where(*path)}: {message}")


def parse(data: Mapping[str, Any], places: Places) -> dict[str, Any]:
    """The keyword arguments of Recipe for a recipe's tables."""
    tables = _Tables(data, places)
    tables.only(
        (),
        data,
        (
            *(
                "schema",
                "made_for",
                "choices",
                "limits",
                "exact",
                "noise",
                "attention",
                "timeline",
                "weights",
            ),
            *("files", "made_by"),
        ),
    )
    schema = data.get("schema")
    if schema != 1 or isinstance(schema, bool):
        found = "has no schema" if "schema" not in data else f"schema is {schema!r}"
        places.fail(("schema",), f"{found}; this version reads schema 1. Start the recipe with: schema = 1")
    noise, limits = tables.table("noise"), tables.table("limits")
    tables.only(("noise",), noise, ("edges",))
    tables.only(("limits",), limits, ("memory_gb", "storage"))
    memory_gb = limits.get("memory_gb")
    return {
        "made_for": tables.made_for(),
        "choices": {letter: tables.choice(letter) for letter in tables.table("choices")},
        "edges": tables.numbers(("noise", "edges"), noise["edges"]) if "edges" in noise else (1.0, 0.0),
        "attention": tables.pictures("attention"),
        "timeline": tables.pictures("timeline"),
        **tables.weights(),
        "storage": tables.text(("limits", "storage"), limits.get("storage", "model")),
        "memory_gb": None if memory_gb is None else tables.number(("limits", "memory_gb"), memory_gb),
        "exact": tables.exact(),
        "files": tables.files(),
        "made_by": {
            key: tables.plain(("made_by", key), value) for key, value in tables.table("made_by").items()
        },
    }


@dataclass(frozen=True)
class _Tables:
    data: Mapping[str, Any]
    places: Places

    def only(self, path: tuple[str, ...], table: Mapping[str, Any], known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                where = f"[{'.'.join(path)}] " if path else ""
                self.places.fail(
                    (*path, key),
                    f'{where}"{key}" is unknown; nearest: {nearest(str(key), known)}. Correct or remove it.',
                )

    def expect(self, path: tuple[str, ...], value: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right:
            self.places.fail(path, f"{_name(path)} must be {wanted}; found {shown(value)}.")
        return value

    def table(self, *path: str) -> Mapping[str, Any]:
        value: Any = self.data
        for key in path:
            value = value.get(key, {})
        table = self.expect(path, value, Mapping, "a table")
        for key in table:
            self.expect((*path, str(key)), key, str, "named by text")
        return table

    def number(self, path: tuple[str, ...], value: Any) -> float:
        self.expect(path, value, (int, float), "a number")
        if not abs(value) < 1e300:
            self.places.fail(path, f"{_name(path)} must be a finite number; found {shown(value)}.")
        return float(value)

    def numbers(self, path: tuple[str, ...], value: Any) -> tuple[float, ...]:
        return tuple(
            self.number(path, item) for item in self.expect(path, value, (list, tuple), "a list of numbers")
        )

    def text(self, path: tuple[str, ...], value: Any) -> str:
        return self.plain(path, self.expect(path, value, str, "text in quotes"))

    def made_for(self) -> MadeFor:
        table = self.table("made_for")
        self.only(("made_for",), table, tuple(each.name for each in fields(MadeFor)))
        values = {key: self.plain(("made_for", key), value) for key, value in table.items()}
        for key in ("family", "model", "scheduler"):
            if key in values:
                self.text(("made_for", key), values[key])
        return MadeFor(**values)

    def exact(self) -> ExactTables:
        table, known = self.table("exact"), tuple(each.name for each in fields(ExactTables))
        self.only(("exact",), table, known)
        return ExactTables(**{key: self.plain(("exact", key), value) for key, value in table.items()})

    def choice(self, letter: str) -> Choice:
        path = ("choices", letter)
        table = dict(self.table(*path))
        if "method" not in table:
            self.places.fail(
                path, f'[choices] {letter} names no method. Write: {letter} = {{ method = "full" }}'
            )
        method = self.text((*path, "method"), table.pop("method"))
        return Choice(letter, method, {key: self.plain((*path, key), value) for key, value in table.items()})

    def pictures(self, seam: str) -> dict[str, dict[str, Any]]:
        pictures: dict[str, dict[str, Any]] = {}
        for branch in self.table(seam):
            rows = pictures[branch] = {}
            for pattern, row in self.table(seam, branch).items():
                path = (seam, branch, pattern)
                if seam == "timeline":
                    rows[pattern] = self.text(path, row)
                else:
                    self.expect(path, row, (list, tuple), "a list with one string per noise interval")
                    rows[pattern] = tuple(self.text(path, string) for string in row)
        return pictures

    def weights(self) -> dict[str, Any]:
        """`weights` and `fitted_at` of Recipe."""
        table = dict(self.table("weights"))
        levels = table.pop("levels", ())
        rows: dict[str, dict[str, Any]] = {}
        for branch in table:
            rows[branch] = {
                site: self.sums(("weights", branch, site)) for site in self.table("weights", branch)
            }
        return {"weights": rows, "fitted_at": self.numbers(("weights", "levels"), levels)}

    def sums(self, path: tuple[str, ...]) -> dict[int, dict[str, float]]:
        """Step -> the weights of named values."""
        found: dict[int, dict[str, float]] = {}
        for step in self.table(*path):
            if not step.isdecimal() or len(step) > 5:
                self.places.fail((*path, step), f"{_name(path)}: {shown(step)} must be the number of a step.")
            weights = self.table(*path, step)
            found[int(step)] = {key: self.number((*path, step, key), each) for key, each in weights.items()}
        return found

    def files(self) -> dict[str, str]:
        """File name -> sha256. Unquoted, `router.safetensors = "..."` is a table to TOML: joined here."""
        found: dict[str, str] = {}
        waiting: list[tuple[tuple[str, ...], Any]] = [
            ((key,), item) for key, item in self.table("files").items()
        ]
        while waiting:
            key, value = waiting.pop(0)
            if isinstance(value, Mapping) and value and len(key) < MAX_DEPTH:
                waiting[:0] = [((*key, str(part)), item) for part, item in value.items()]
            else:
                found[".".join(key)] = self.text(("files", *key), value).lower()
        return found

    def plain(self, path: tuple[str, ...], value: Any, depth: int = 0) -> Any:
        """A TOML value that can be written again and compared: lists become tuples."""
        if depth > MAX_DEPTH:
            self.places.fail(path, f"{_name(path)} is nested more than {MAX_DEPTH} deep. Flatten it.")
        if isinstance(value, Mapping):
            for key in value:
                self.expect(path, key, str, "a table with text keys")
            return {self.plain(path, key): self.plain(path, item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return tuple(self.plain(path, item, depth + 1) for item in value)
        if isinstance(value, float) and not math.isfinite(value):
            self.places.fail(path, f"{_name(path)} must be a finite number; found {value}.")
        if isinstance(value, int) and abs(value) >= 2**63:
            self.places.fail(path, f"{_name(path)} does not fit in 64 bits. Use a smaller whole number.")
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            self.places.fail(
                path, f"{_name(path)} holds half a character (a lone surrogate). Use valid Unicode text."
            )
        if isinstance(value, bool | datetime.date | datetime.time):
            return value
        return self.expect(path, value, (str, int, float), "a text, number, date, list or table")


def shown(value: Any) -> str:
    """A value as an error message can carry it."""
    text = repr(value) if not isinstance(value, Mapping) else "a table"
    return text if len(text) <= 60 else text[:57] + "..."


def _name(path: tuple[str, ...]) -> str:
    if len(path) < 2:
        return f"[{path[0]}]" if path else "the recipe"
    depth = 2 if path[0] in ("attention", "timeline", "weights") and len(path) > 2 else 1
    return f"[{'.'.join(path[:depth])}] {'.'.join(path[depth:])}"
