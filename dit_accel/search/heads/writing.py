"""A solved plan as a recipe: heads by noise level in [attention], whole modules by step in [timeline]."""

import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.heads.candidates import Candidate
from dit_accel.search.heads.segments import CC, CS, FULL, REUSE, RS, LayerPlan
from dit_accel.search.rows import recipe_of_rows
from dit_accel.sites import EVERYTHING
from dit_accel.timeline import BRANCHES

TIMELINE = {"cond": {CC: "C", CS: "C", RS: "r"}, "uncond": {CC: "C", CS: "s", RS: "s"}}


class Letters:
    """A letter for every candidate in use; a capital where a full pass leaves something for it."""

    def __init__(self) -> None:
        self.known: dict[Candidate, str] = {}
        self._free: Iterator[str] = iter(x for x in string.ascii_lowercase if x not in "crsf")

    def of(self, candidate: Candidate) -> str:
        """The candidate's letter."""
        if candidate not in self.known:
            self.known[candidate] = next(self._free)
        return self.known[candidate]


def recipe_of(
    plans: Mapping[Key, LayerPlan], levels: Sequence[float], ages: int, backend: bool,
    made_for: Mapping[str, Any], name: str = "plan", memory_gb: float | None = None, others: bool = False,
) -> Recipe:  # fmt: skip
    """The recipe of some layers' plans. `backend`: full attention runs through the fastest one.

    `others`: so do all attentions that have no plan, cross-attention above all.
    """
    letters = Letters()
    heads = {b: {key: _head_rows(plan, b, letters) for key, plan in plans.items()} for b in BRANCHES}
    if others:  # a row of a layer's own comes later, and wins
        heads = {b: {("transformer", EVERYTHING): ["F"] * len(levels), **rows} for b, rows in heads.items()}
    timeline = {
        b: {key: "".join(TIMELINE[b][action] for action in plan.actions) for key, plan in plans.items()}
        for b in BRANCHES
    }
    choices = _choices(letters, ages, backend)
    idle = "" if backend else "F"
    return recipe_of_rows(heads, timeline, choices, levels, made_for, name, memory_gb, idle)


def _head_rows(plan: LayerPlan, branch: str, letters: Letters) -> list[str]:
    """One text for each step, one letter for each head; where the module is skipped nothing changes."""
    rows: list[str] = []
    for step, action in enumerate(plan.actions):
        if TIMELINE[branch][action] != "C":
            # an anchor's letter must not stand where its pass does not run
            rows.append("".join(x if x == "F" else x.lower() for x in rows[-1]))
            continue
        row = ""
        for pick, follows, feed in zip(plan.picks[step], plan.follows[step], plan.feeds[step], strict=True):
            if feed is not None:
                row += letters.of(feed).upper()
            elif follows and branch == "uncond":
                row += "s"
            elif pick in (FULL, REUSE):
                row += "F" if pick == FULL else "r"
            else:
                row += letters.of(pick)  # pyright: ignore[reportArgumentType]
        rows.append(row)
    return rows


def _choices(letters: Letters, ages: int, backend: bool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "F": {"method": "full", **({"backend": "auto"} if backend else {})},
        "C": {"method": "compute"},
        "r": {"method": "reuse", "max_age": ages},
        "s": {"method": "share_branch", "difference": True, "max_age": ages},
    }
    for candidate, letter in letters.known.items():
        own = {"method": candidate.method, **candidate.parameters}
        found[letter] = own | ({"max_age": ages} if candidate.anchored else {})
        if candidate.anchored:
            found[letter.upper()] = found[letter] | {"refresh": True}
    return found
