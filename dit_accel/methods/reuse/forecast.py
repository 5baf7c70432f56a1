"""Forecast: answer with stored outputs continued to the noise level of the running step.

Source: TaylorSeer, Liu et al. 2025, arXiv:2503.06923, section 3.2, with noise level in place of the step
    index; a recipe's [weights] replace w by what least squares found over the same outputs.
Idea: y(u) = sum_j w_j(u) y(u_j) over the last order + 1 outputs that were computed; see `extrapolation`.
Keeps: order + 1 times what `reuse` keeps.
Exact when: the output is a polynomial of degree `order` in the noise level (lagrange); order 0 is `reuse`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dit_accel import extrapolation

MOST = 4  # an op mixes at most eight outputs, and no order above 4 has helped anybody


@dataclass(frozen=True)
class Forecast:
    """Answer with the last `order` + 1 outputs, the newest at most `max_age` steps old.

    Where fewer were computed so far the order is lower. `gates` is that of `reuse`.
    """

    order: int = 1
    max_age: int = 2
    kind: Literal["lagrange", "taylor"] = "lagrange"
    gates: Literal["current", "stored"] = "stored"

    seams: ClassVar[frozenset[str]] = frozenset({"timeline"})
    computes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.order <= MOST:
            raise ValueError(f"order must be from 0 to {MOST}; got {self.order}")
        if self.max_age < 0:
            raise ValueError(f"max_age must be a number of steps >= 0; got {self.max_age}")

    @property
    def nodes(self) -> int:
        """Stored outputs that one answer reads."""
        return self.order + 1

    def weights(self, level: float, nodes: Sequence[float]) -> tuple[float, ...]:
        """One weight for each stored output, newest first; `nodes` are their noise levels."""
        return extrapolation.weights(self.kind, level, nodes)
