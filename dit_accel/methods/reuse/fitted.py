"""Fitted: answer with a weighted sum of stored values whose weights a search has found by least squares.

Source: the closed-form forecast w* = (G_JJ + rho I)^-1 G_Ji over a Gram matrix of dense runs; Taylor,
    Adams-Bashforth, DMD and a copy from the other branch are points of the same space.
Idea: y(i) = sum_k c_k y_cond(k) + sum_k u_k y_uncond(k) + sum_k x_k x(k), with the values of any computed
    step k of either branch and, for the whole denoiser, its inputs x (the latents) up to the running step.
    The recipe's [weights] holds them by name.
Keeps: every value that a later step reads, for as long as it is read.
Exact when: the site is that linear map of its past; on another schedule it is `forecast` of its `order`.
"""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.methods.reuse.forecast import Forecast


@dataclass(frozen=True)
class Fitted:
    """Answer by the recipe's [weights]; `order` and `max_age` hold where these do not fit the schedule."""

    order: int = 1
    max_age: int = 2

    seams: ClassVar[frozenset[str]] = frozenset({"timeline"})
    computes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    nodes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        self.otherwise  # noqa: B018  checks both numbers

    @property
    def otherwise(self) -> Forecast:
        """What takes its place where it has no weights."""
        return Forecast(self.order, self.max_age)
