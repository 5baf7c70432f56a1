"""One plan for the whole pipeline: every layer at one price of a second, and the price by what is asked.

Layers do not compete for anything but time and memory: at a given price each is solved alone, exactly, and
the sum is the best plan of its seconds. So a goal is a bisection of the price (a Lagrange multiplier), and
what it can miss is less than one step of one layer. Where bytes are bounded, layers that make the least
of theirs keep nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dit_accel.plan import Key
from dit_accel.search.plan.segments import LayerPlan, LayerSolver, LayerTable
from dit_accel.search.plan.storing import poorest, stateless

HALVINGS = 30


@dataclass(frozen=True)
class PipelinePlan:
    """All layers at one price: the predicted squared error of the frames, and seconds of a generation."""

    price: float
    layers: Mapping[Key, LayerPlan]
    error: float
    seconds: float

    def by_step(self) -> np.ndarray:
        """[T]: the predicted error that each step adds."""
        return np.sum([layer.by_step for layer in self.layers.values()], axis=0)


class Planner:
    """Solves all layers together. `rest` are the seconds of a generation outside of these layers.

    `limit` are the bytes that may be kept, `bytes_of` tells those of a layer's plan.
    """

    def __init__(
        self, tables: Mapping[Key, LayerTable], rest: float, limit: float = math.inf,
        bytes_of: Callable[[Key, LayerPlan], int] = lambda key, plan: 0,
    ):  # fmt: skip
        self.solvers = {key: LayerSolver(table) for key, table in tables.items()}
        self.rest, self.limit, self.bytes_of = rest, limit, bytes_of
        bounded = limit < math.inf
        self.lean = {key: LayerSolver(stateless(table)) for key, table in tables.items()} if bounded else {}

    def at(self, price: float) -> PipelinePlan:
        """The best plan at a price: squared error that a second is worth."""
        layers = {key: solver.solve(price) for key, solver in self.solvers.items()}
        if self.lean:
            self._fit(layers, price)
        error = sum(layer.error for layer in layers.values())
        return PipelinePlan(price, layers, error, self.rest + sum(layer.seconds for layer in layers.values()))

    def _fit(self, layers: dict[Key, LayerPlan], price: float) -> None:
        """Take from the layers that make the least of it what they keep, until all fits."""
        kept = {key: self.bytes_of(key, plan) for key, plan in layers.items()}
        lean = {key: solver.solve(price) for key, solver in self.lean.items()}
        while sum(kept.values()) > self.limit:
            key = poorest(layers, kept, lean, price)
            layers[key], kept[key] = lean[key], 0

    def within_seconds(self, seconds: float) -> PipelinePlan:
        """The least error in at most so many seconds; the fastest plan where nothing is that fast."""
        return self._bisect(lambda plan: plan.seconds <= seconds)

    def within_error(self, error: float) -> PipelinePlan:
        """The least seconds with at most so much error."""
        slower = self._bisect(lambda plan: plan.error > error)
        return slower if slower.error <= error else self.at(slower.price / 2 ** (1 / 8))

    def _bisect(self, enough: Callable[[PipelinePlan], bool]) -> PipelinePlan:
        """The plan of the least price at which `enough` holds."""
        low, high = self._range()
        best = self.at(high)
        if not enough(best):
            return best
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            plan = self.at(middle)
            if enough(plan):
                best, high = plan, middle
            else:
                low = middle
            if high / low < 1.01:
                break
        return best

    def _range(self) -> tuple[float, float]:
        """Prices at which nothing and everything is worth saving."""
        everything = self.at(1e30)
        scale = max(everything.error, 1e-30) / max(self.rest, 1e-9)
        return scale * 1e-12, scale * 1e6
