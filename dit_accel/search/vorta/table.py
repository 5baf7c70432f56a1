"""A trained router as a table: its scores at the noise levels of a schedule, and the recipe of it.

Source: VORTA, Sun et al. 2025, arXiv:2505.18809. There a router runs at every forward; but it sees the noise
level alone, so here it is written down: one letter for each head and interval. Where no branch has a score
of at least tau a head is full. A softmax over three is never below 1/3: a tau up to there, as the published
0.3, would change nothing and is refused. A goal is reached by tau: with a greater one more heads are full,
slower and nearer to dense.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_accel import timeline
from dit_accel.errors import BadUsage
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured
from dit_accel.search.rows import recipe_of_rows
from dit_accel.train.vorta.branches import LETTERS, Branches
from dit_accel.train.vorta.router import BRANCHES

SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85)  # of the cheap entries that a tau makes full, where a goal asks


def check_tau(tau: float | None) -> None:
    """BadUsage for a threshold that could not change anything, or leaves nothing but full."""
    if tau is not None and not 1 / BRANCHES < tau < 1:
        raise BadUsage(
            f"asked for --tau {tau:g}; the greatest of {BRANCHES} scores that sum to 1 is never below "
            "1/3, and never 1. Give one between them, or leave it out: then no score is too small."
        )


def letters_of(scores: np.ndarray, tau: float | None) -> np.ndarray:
    """The branch of each head, [..., 3] -> [...]: the best one; full where no score is at least tau."""
    best = scores.argmax(-1)
    return best if tau is None else np.where(scores.max(-1) < tau, 0, best)


def compile_table(
    table: Mapping[str, np.ndarray], levels: Sequence[float], branches: Branches,
    made_for: Mapping[str, Any], tau: float | None = None, name: str = "vorta", across: Iterable[str] = (),
) -> Recipe:  # fmt: skip
    """The recipe of scores [T, H, 3] at falling noise levels [T]; the sites `across` are full in it."""
    check_tau(tau)
    full = LETTERS[0]
    rows: dict[Key, list[str]] = {("transformer", site): [full] * len(levels) for site in across}
    for site, scores in table.items():
        picks = letters_of(scores, tau)
        rows["transformer", site] = ["".join(LETTERS[i] for i in heads) for heads in picks]
    choices = branches.choices()
    idle = full if choices[full] == {"method": "full"} else ""  # a backend of ours is something else
    heads = {str(branch): rows for branch in timeline.BRANCHES}
    return recipe_of_rows(heads, {}, choices, levels, made_for, name, idle=idle)


def taus(table: Mapping[str, np.ndarray], shares: Sequence[float] = SHARES) -> list[float | None]:
    """Thresholds that make these shares of the cheap entries full, rising; None is no threshold."""
    every = np.concatenate([scores.reshape(-1, BRANCHES) for scores in table.values()])
    best = np.sort(every.max(-1)[every.argmax(-1) > 0])
    found: list[float | None] = [None]
    for share in shares:
        if share > 0 and len(best):
            tau = round(float(best[min(len(best) - 1, int(share * len(best)))]), 6)
            if 1 / BRANCHES < tau < 1 and tau != found[-1]:
                found.append(tau)
    return found


def pick_tau(
    goal: Goal, candidates: Sequence[float | None], measure: Callable[[float | None], Measured],
    ended: Callable[[], bool],
) -> tuple[float | None, dict[float | None, Measured]]:  # fmt: skip
    """The threshold that reaches a goal best, and all that were measured.

    Candidates rise, and with them quality, while speed falls: the last that is fast enough is found by
    halving, or the first that is near enough.
    """
    tried: dict[float | None, Measured] = {}
    low, high = 0, len(candidates) - 1
    while low <= high:
        middle = 0 if not tried else (low + high) // 2
        tau = candidates[middle]
        tried[tau] = measure(tau)
        if ended():
            break
        # without a threshold nothing is faster: if that is too slow, or near enough, all is known
        if goal.reached(tried[tau]) == (goal.kind == "speedup"):
            low = middle + 1
        else:
            high = middle - 1
    reached = [tau for tau, each in tried.items() if goal.reached(each)]
    if not reached:
        return max(tried, key=lambda tau: tried[tau][goal.kind]), tried
    other = "psnr" if goal.kind == "speedup" else "speedup"
    return max(reached, key=lambda tau: tried[tau][other]), tried
