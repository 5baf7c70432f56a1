"""One 0/1 program: of each head at most one candidate, so that the most work is saved within an error.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.3, which gives it to GLPK:

    max  sum gain(h, m) x(h, m)     such that   sum_m x(h, m) <= 1 for each head h,
                                                sum error(h, m) x(h, m) <= delta

It is a multiple-choice knapsack, and solved exactly: heads are added one by one to a list of (gain, error)
pairs, none of which is beaten by another in both. A pair from which even fractions of the heads to come
cannot reach what a greedy choice reaches is dropped. With 40 heads and 5 candidates that leaves few pairs,
and no solver of linear programs is needed at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NONE = -1  # a head that takes no candidate
SLACK = 1e-9  # gains nearer than this are equal: sums in another order differ in their last digits


@dataclass(frozen=True)
class _Options:
    """Candidates of one head of which none is beaten, by rising error and gain; the first takes none."""

    numbers: np.ndarray
    gains: np.ndarray
    errors: np.ndarray


def solve(errors: np.ndarray, gains: Sequence[float], delta: float, cap: float = np.inf) -> list[int]:
    """The candidate of every head, or NONE: the most gain with errors that add up to `delta` at most.

    errors [H, M], inf where a head may not take a candidate; those at `cap` and above are not taken. Of
    equal gains the choice of least error is given.
    """
    usable = np.where(errors < cap, errors, np.inf)
    heads = [_options(row, np.asarray(gains, float), delta) for row in usable]
    bounds = [_Bound(heads[first:]) for first in range(len(heads) + 1)]
    enough = _greedy(heads, delta) - SLACK
    gain, error = np.zeros(1), np.zeros(1)
    stages: list[tuple[np.ndarray, np.ndarray]] = []  # of every kept pair: the pair before, the option taken
    for head, rest in zip(heads, bounds[1:], strict=True):
        more_gain = (gain[:, None] + head.gains).ravel()
        more_error = (error[:, None] + head.errors).ravel()
        fits = np.flatnonzero(more_error <= delta)
        fits = fits[more_gain[fits] + rest.at(delta - more_error[fits]) >= enough]
        kept = fits[_unbeaten(more_gain[fits], more_error[fits])]
        stages.append((kept // len(head.gains), kept % len(head.gains)))
        gain, error = more_gain[kept], more_error[kept]
    chosen, at = [], 0  # pairs are kept by falling gain: the first is the best
    for head, (before, option) in zip(heads[::-1], stages[::-1], strict=True):
        chosen.append(int(head.numbers[option[at]]))
        at = before[at]
    return chosen[::-1]


def _options(errors: np.ndarray, gains: np.ndarray, delta: float) -> _Options:
    numbers = np.flatnonzero(errors <= delta)
    numbers = np.concatenate([[NONE], numbers])
    of_gain = np.where(numbers == NONE, 0.0, gains[numbers])
    of_error = np.where(numbers == NONE, 0.0, errors[numbers])
    kept = _unbeaten(of_gain, of_error)[::-1]
    return _Options(numbers[kept], of_gain[kept], of_error[kept])


def _unbeaten(gains: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Places of the pairs that no other beats, by falling gain and so by falling error."""
    rounded = np.round(gains / SLACK)
    order = np.lexsort((errors, -rounded))
    least = np.minimum.accumulate(errors[order])
    return order[np.concatenate([[True], errors[order][1:] < least[:-1]])] if len(order) else order


def _steps(head: _Options) -> list[tuple[float, float]]:
    """(gain, error) of each step along the upper hull of a head's options: gain per error falls."""
    hull = [0]
    for at in range(1, len(head.gains)):
        while len(hull) > 1 and _slope(head, hull[-2], hull[-1]) <= _slope(head, hull[-2], at):
            hull.pop()
        hull.append(at)
    return [(head.gains[b] - head.gains[a], head.errors[b] - head.errors[a]) for a, b in pairwise(hull)]


def _slope(head: _Options, a: int, b: int) -> float:
    return (head.gains[b] - head.gains[a]) / max(head.errors[b] - head.errors[a], 1e-300)


class _Bound:
    """The most gain of some heads within an error, if a candidate could be taken in part."""

    def __init__(self, heads: Sequence[_Options]):
        free = sum(float(head.gains[0]) for head in heads)  # taken at no error at all
        steps = sorted((step for head in heads for step in _steps(head)), key=lambda s: -s[0] / s[1])
        self.errors = np.cumsum([0.0, *(error for _, error in steps)])
        self.gains = np.cumsum([free, *(gain for gain, _ in steps)])

    def at(self, budget: np.ndarray) -> np.ndarray:
        """Of every budget: [n]."""
        return np.interp(budget, self.errors, self.gains)


def _greedy(heads: Sequence[_Options], delta: float) -> float:
    """A gain that can be had: steps of the hulls by gain per error, as long as they fit."""
    steps = [(step, number) for number, head in enumerate(heads) for step in _steps(head)]
    gain, left, closed = sum(float(head.gains[0]) for head in heads), delta, set[int]()
    for (more, error), number in sorted(steps, key=lambda s: -s[0][0] / s[0][1]):
        if number in closed:
            continue
        if error <= left:
            gain, left = gain + more, left - error
        else:
            closed.add(number)
    return gain
