"""Which delta gives the speedup or the quality asked for: a few searches, each measured by real generations.

A greater delta takes more and costs more, so the deltas are bisected in their logarithm: between one that is
too small and one that is too great, after steps of `REACH` from where the method begins. What is
chosen was measured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dit_accel.errors import BadUsage

REACH, CLOSE = 8.0, 1.25
# where a pursuit begins, a delta that hurts little: errors of a step's output, of a layer's at a step, and of
# the frames where errors are weighed as they are felt there
FIRST_DELTAS = {"ditfastattn": 3e-4, "ditfastattn_v2": 3e-3, "felt": 1e-7}
LIMITS = (1e-9, 10.0)  # a relative squared error of 1 is an output that says nothing

Measured = Mapping[str, float]  # "speedup" and "psnr"


@dataclass(frozen=True)
class Goal:
    """`kind` is "delta", "speedup" (at least this fast, as near to dense as can be) or "psnr" (so near)."""

    kind: str
    value: float

    def reached(self, measured: Measured) -> bool:
        """Whether a measured recipe gives what was asked."""
        return self.kind == "delta" or measured[self.kind] >= self.value

    def too_small(self, measured: Measured) -> bool:
        """Whether a greater delta is the place to look next."""
        return self.reached(measured) == (self.kind == "psnr")

    def best(self, tried: Mapping[float, Measured]) -> float:
        """Of those that reach the goal the best in the other respect; if none does, the nearest to it."""
        if self.kind == "delta":
            return self.value
        reached = [delta for delta, measured in tried.items() if self.reached(measured)]
        if not reached:
            return max(tried, key=lambda delta: tried[delta][self.kind])
        other = "psnr" if self.kind == "speedup" else "speedup"
        return max(reached, key=lambda delta: tried[delta][other])


def check_goal(
    delta: float | None, speedup: float | None, psnr: float | None, steps: int, first: float = 3e-4
) -> Goal:
    """The goal of a command line; BadUsage where it is none, more than one, or out of reach for anybody."""
    given = {"delta": delta, "speedup": speedup, "psnr": psnr}
    asked = {kind: value for kind, value in given.items() if value is not None}
    if len(asked) != 1:
        found = " and ".join(f"--{kind} {value}" for kind, value in asked.items()) or "none of them"
        raise BadUsage(
            f"asked to search; it takes one of --delta, --speedup and --psnr; found {found}. "
            f"Give one: --delta {first:g} is a first try."
        )
    ((kind, value),) = asked.items()
    limits = {"delta": LIMITS, "speedup": (1.0, float(steps)), "psnr": (0.0, 100.0)}[kind]
    why = f": the first of {steps} steps computes everything" if kind == "speedup" else ""
    if not limits[0] < value < limits[1]:
        raise BadUsage(
            f"asked for --{kind} {value}; it must be over {limits[0]:g} and under {limits[1]:g}{why}. "
            "Ask for another."
        )
    return Goal(kind, value)


def _between(small: float, great: float) -> float:
    """The next delta, of a few digits: that in a recipe gives the same search again."""
    if great == math.inf:
        return float(f"{small * REACH:.3g}")
    return float(f"{math.sqrt(small * great) if small else great / REACH:.3g}")


def pursue(
    goal: Goal, measure: Callable[[float], Measured], ended: Callable[[], bool], start: float, tries: int = 5
) -> tuple[float, dict[float, Measured]]:
    """The chosen delta, and all that were tried from `start` on. `measure(delta)` searches and measures."""
    tried: dict[float, Measured] = {}
    small, great, delta = 0.0, math.inf, goal.value if goal.kind == "delta" else start
    while True:
        tried[delta] = measure(delta)
        if goal.kind == "delta" or len(tried) == tries or ended():
            break
        if goal.too_small(tried[delta]):
            small = delta
        else:
            great = delta
        if great / max(small, 1e-300) < CLOSE:
            break
        delta = _between(small, great)
        if not LIMITS[0] < delta < LIMITS[1]:
            break
    return goal.best(tried), tried
