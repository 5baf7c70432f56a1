"""A solved plan as a recipe: heads by noise level in [attention], whole modules by step in [timeline]."""

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.segments import CC, CS, FULL, REUSE, RS, LayerPlan
from dit_accel.search.rows import recipe_of_rows
from dit_accel.timeline import BRANCHES

MODEL, AUTO = "F", "Q"  # full attention by the model, and through the fastest backend
TIMELINE = {"cond": {CC: "C", CS: "C", RS: "r"}, "uncond": {CC: "C", CS: "s", RS: "s"}}


class Letters:
    """A letter for every candidate in use; a capital where a full pass leaves something for it."""

    def __init__(self) -> None:
        self.known: dict[Candidate, str] = {}
        self._free: Iterator[str] = iter(x for x in string.ascii_lowercase if x not in "crsfq")

    def of(self, candidate: Candidate) -> str:
        """The candidate's letter."""
        if candidate not in self.known:
            self.known[candidate] = next(self._free)
        return self.known[candidate]


def recipe_of(
    plans: Mapping[Key, LayerPlan], levels: Sequence[float], ages: int, backend: Collection[Key],
    made_for: Mapping[str, Any], name: str = "plan", memory_gb: float | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of some layers' plans. `backend`: layers whose full heads run through the fastest one."""
    letters = Letters()
    heads = {
        b: {key: _head_rows(plan, b, letters, key in backend) for key, plan in plans.items()}
        for b in BRANCHES
    }
    timeline = {
        b: {key: "".join(TIMELINE[b][action] for action in plan.actions) for key, plan in plans.items()}
        for b in BRANCHES
    }
    choices = _choices(letters, ages)
    return recipe_of_rows(heads, timeline, choices, levels, made_for, name, memory_gb, idle=MODEL)


def _head_rows(plan: LayerPlan, branch: str, letters: Letters, backend: bool) -> list[str]:
    """One text for each step, one letter for each head; where the module is skipped nothing changes."""
    rows: list[str] = []
    for step, action in enumerate(plan.actions):
        if TIMELINE[branch][action] != "C":
            # an anchor's letter must not stand where its pass does not run
            rows.append("".join(x if x in (MODEL, AUTO) else x.lower() for x in rows[-1]))
            continue
        row = ""
        for pick, follows, feed in zip(plan.picks[step], plan.follows[step], plan.feeds[step], strict=True):
            if feed is not None:
                row += letters.of(feed).upper()
            elif follows and branch == "uncond":
                row += "s"
            elif pick in (FULL, REUSE):
                row += "r" if pick == REUSE else AUTO if backend else MODEL
            else:
                row += letters.of(pick)  # pyright: ignore[reportArgumentType]
        rows.append(row)
    return rows


def _choices(letters: Letters, ages: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        MODEL: {"method": "full"},
        AUTO: {"method": "full", "backend": "auto"},
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
