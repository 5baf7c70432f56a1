"""Where a plan's error really comes from: it runs again with one part of it full, part by part.

What is scored holds for single changes; in a plan they add up or cancel, over steps and layers. So the
frames' error without a part is measured: the more it falls, the more the part is to blame. Steps (in ranges)
and layers are looked at apart, and their errors are scaled by what was found over what was predicted.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dit_accel.plan import Key
from dit_accel.search.plan.planning import PipelinePlan
from dit_accel.search.plan.segments import CC, FULL, LayerPlan

RANGES = 5
MILDEST = 0.25  # of what a part is blamed for at least, and 1 / it at most: one look is one prompt's
Measure = Callable[
    [Mapping[Key, LayerPlan]], float
]  # the squared error of the frames under these layers' plans


@dataclass(frozen=True)
class Scales:
    """Factors for the foretold errors of steps [T] and of layers."""

    steps: np.ndarray
    layers: Mapping[Key, float]

    @classmethod
    def even(cls, steps: int, layers: Iterable[Key]) -> "Scales":
        """As scored."""
        return cls(np.ones(steps), dict.fromkeys(layers, 1.0))

    def times(self, other: "Scales") -> "Scales":
        """Both after one another."""
        layers = {key: factor * other.layers[key] for key, factor in self.layers.items()}
        return Scales(self.steps * other.steps, layers)


def ranges_of(steps: int) -> list[range]:
    """The steps in ranges of about equal length; step 0 computes anyway."""
    edges = np.linspace(1, steps, min(RANGES, steps - 1) + 1).round().astype(int)
    return [range(first, last) for first, last in pairwise(edges)]


def without_steps(plan: LayerPlan, steps: Sequence[int]) -> LayerPlan:
    """The plan with everything full at some steps; its anchors there still leave what later steps read."""
    found = copy.deepcopy(plan)
    for step in steps:
        found.actions[step] = CC
        heads = len(found.picks[step])
        found.picks[step], found.follows[step] = [FULL] * heads, [False] * heads
        found.by_step[step] = 0.0
    return found


def blame(plan: PipelinePlan, steps: int, measure: Measure) -> Scales:
    """What a plan's foretold errors are to be scaled by."""
    whole = measure(plan.layers)
    by_step, factors = plan.by_step(), np.ones(steps)
    predicted = [float(by_step[part].sum()) for part in ranges_of(steps)]
    found = [
        whole - measure({key: without_steps(layer, part) for key, layer in plan.layers.items()})
        for part in ranges_of(steps)
    ]
    for part, factor in zip(ranges_of(steps), _factors(found, predicted), strict=True):
        factors[part] = factor
    predicted = [layer.error for layer in plan.layers.values()]
    found = []
    for key in plan.layers:
        others = {other: layer for other, layer in plan.layers.items() if other != key}
        blank = LayerPlan.full(steps, len(plan.layers[key].picks[0]))
        found.append(whole - measure({**others, key: blank}))
    return Scales(factors, dict(zip(plan.layers, _factors(found, predicted), strict=True)))


def _factors(found: Sequence[float], predicted: Sequence[float]) -> list[float]:
    """Found over predicted, each as a share of its sum, within bounds; a part that did nothing keeps 1."""
    total, guessed = sum(max(each, 0.0) for each in found), sum(predicted)
    if total <= 0 or guessed <= 0:
        return [1.0] * len(found)
    shares = [
        (max(real, 0.0) / total) / (guess / guessed) if guess > 0 else 1.0
        for real, guess in zip(found, predicted, strict=True)
    ]
    return [float(np.clip(share, MILDEST, 1 / MILDEST)) for share in shares]
