"""Which visits to skip: the rows of letters whose predicted error is least at a given amount of work.

At each step both branches compute (CC), uncond is derived from cond (Cs), or both answer from before (rs).
The first step computes both. Among all rows of equal work a descent from evenly spread skips changes two
steps in opposite directions until no change helps.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np

from dit_accel.search.trajectory import Trajectory

ACTIONS = ("CC", "Cs", "rs")  # in order of the visits they skip: 0, 1, 2

Actions = tuple[int, ...]  # an index into ACTIONS for each step


def letters(actions: Actions) -> tuple[str, str]:
    """(cond, uncond) rows of a recipe's timeline."""
    return "".join(ACTIONS[a][0] for a in actions), "".join(ACTIONS[a][1] for a in actions)


def work(actions: Actions) -> float:
    """The share of the visits that compute."""
    return 1 - sum(actions) / (2 * len(actions))


def predicted_error(trajectories: Sequence[Trajectory], actions: Actions) -> float:
    """The geometric mean over the trajectories: each counts by its decibels."""
    errors = [trajectory.error(letters(actions)) for trajectory in trajectories]
    return float(np.exp(np.mean(np.log(np.maximum(errors, 1e-12)))))


def choose(trajectories: Sequence[Trajectory], skips: int) -> Actions:
    """The best rows found that skip `skips` of the 2T visits."""
    steps = len(trajectories[0].weight)
    if not 0 <= skips <= 2 * (steps - 1):
        raise ValueError(f"{steps} steps can skip 0 to {2 * (steps - 1)} visits; got {skips}")
    found = [_descend(trajectories, start) for start in _starts(steps, skips)]
    return min(found, key=lambda actions: predicted_error(trajectories, actions))


def _starts(steps: int, skips: int) -> list[Actions]:
    """Skips evenly spread: with as few steps that skip both branches as possible, and with as many."""
    return [_evenly(steps, skips, double) for double in (max(0, skips - (steps - 1)), skips // 2)]


def _evenly(steps: int, skips: int, double: int) -> Actions:
    """`double` steps skip both branches, as many as are left over skip uncond."""
    actions = [0] * steps
    for place in _spread(range(1, steps), double):
        actions[place] = 2
    free = [place for place in range(1, steps) if not actions[place]]
    for place in _spread(free, skips - 2 * double):
        actions[place] = 1
    return tuple(actions)


def _spread(places: Sequence[int], count: int) -> list[int]:
    return [places[int((i + 0.5) * len(places) / count)] for i in range(count)]


def _descend(trajectories: Sequence[Trajectory], actions: Actions) -> Actions:
    best = predicted_error(trajectories, actions)
    while True:
        tried = [(predicted_error(trajectories, near), near) for near in _neighbours(actions)]
        least, near = min(tried, default=(best, actions))
        if least >= best:
            return actions
        best, actions = least, near


def _neighbours(actions: Actions) -> Iterator[Actions]:
    """All rows of equal work that differ in two steps."""
    for i, j in combinations(range(1, len(actions)), 2):
        for change in (1, -1, 2, -2):
            if 0 <= actions[i] + change <= 2 and 0 <= actions[j] - change <= 2:
                near = list(actions)
                near[i] += change
                near[j] -= change
                yield tuple(near)
