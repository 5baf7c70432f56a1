"""From letters by step to a recipe: noise intervals at which nothing changes, and tables by branch."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dit_accel.errors import BadUsage
from dit_accel.plan import Key
from dit_accel.recipe import Recipe

Heads = Mapping[str, Mapping[Key, Sequence[str]]]  # branch -> layer -> per step a letter, or one a head
Modules = Mapping[str, Mapping[Key, str]]  # branch -> layer -> a letter for each step


def recipe_of_rows(
    heads: Heads, timeline: Modules, choices: Mapping[str, Mapping[str, Any]], levels: Sequence[float],
    made_for: Mapping[str, Any], name: str, memory_gb: float | None = None, idle: Iterable[str] = "F",
) -> Recipe:  # fmt: skip
    """The recipe of some layers' letters on a schedule with these noise levels.

    `idle` are the letters of heads that change nothing: a layer that has no other is left out. Letters that
    no row uses are left out as well. Raises BadUsage where two steps have one noise level: a recipe could not
    tell them apart.
    """
    if any(not high > low for high, low in pairwise(levels)):
        raise BadUsage(
            f"asked for a plan by noise level; the levels of this schedule do not fall: {list(levels)}. "
            "Use another scheduler or fewer steps."
        )
    spans = _intervals(heads, len(levels))
    edges = [1.0, *(round((levels[first - 1] + levels[first]) / 2, 7) for first, _ in spans[1:]), 0.0]
    intervals = {
        branch: {site_of(key): [row[first] for first, _ in spans] for key, row in rows.items()}
        for branch, rows in heads.items()
    }
    steps = {branch: {site_of(key): row for key, row in rows.items()} for branch, rows in timeline.items()}
    data: dict[str, Any] = {
        "schema": 1,
        "made_for": {**made_for, "steps": len(levels)},
        "noise": {"edges": edges},
        "attention": _tables(intervals, frozenset(idle)),
        "timeline": _tables(steps, frozenset("C")),
    }
    used = {"C", "F"}
    for rows in (*intervals.values(), *steps.values()):
        used.update(letter for row in rows.values() for text in row for letter in text)
    data["choices"] = {letter: dict(choice) for letter, choice in choices.items() if letter in used}
    if memory_gb is not None:
        data["limits"] = {"memory_gb": memory_gb}
    return Recipe.from_dict(data, name=name)


def site_of(key: Key) -> str:
    """A layer as a recipe names it."""
    return key[1] if key[0] == "transformer" else f"{key[0]}.{key[1]}"


def _intervals(heads: Heads, steps: int) -> list[tuple[int, int]]:
    """Runs of steps at which no letter of a head changes: (first, last)."""
    rows = [row for of_branch in heads.values() for row in of_branch.values()]
    columns = [tuple(row[step] for row in rows) for step in range(steps)]
    starts = [step for step in range(steps) if step == 0 or columns[step] != columns[step - 1]]
    return list(zip(starts, [start - 1 for start in starts[1:]] + [steps - 1], strict=True))


def _tables(by_branch: Mapping[str, Mapping[str, Any]], idle: frozenset[str]) -> dict[str, dict[str, Any]]:
    """Rows that say something, under `both` where the branches agree."""
    found: dict[str, dict[str, Any]] = {"both": {}, "cond": {}, "uncond": {}}
    for site, cond in by_branch.get("cond", {}).items():
        uncond = by_branch["uncond"][site]
        if {letter for row in (cond, uncond) for text in row for letter in text} <= idle:
            continue
        if cond == uncond:
            found["both"][site] = cond
        else:
            found["cond"][site], found["uncond"][site] = cond, uncond
    return {branch: table for branch, table in found.items() if table}
