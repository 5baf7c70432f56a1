"""Share across branches: the unconditional branch answers with the conditional one's output.

Source: attention sharing across CFG (ASC) of DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.4:
    a plain copy. With `difference` the last difference between the branches is added,

        o_u(t) = o_c(t) + [ o_u(a) - o_c(a) ],     a = last step before t at which uncond was computed,

    which a trial on a small Wan found 17-21 dB better at equal cost. With `order` the difference itself is
    continued to the running step's noise level from the last order + 1 of them (timeline only).
Keeps: cond's output of the running step and, with `difference`, order + 1 stored differences.
Exact when: every step computes (max_age = 0), or the difference between the branches does not change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel import extrapolation
from dit_accel.methods.reuse.forecast import MOST
from dit_accel.visit import AttentionVisit


@dataclass(frozen=True)
class ShareBranch:
    """Derive `uncond` from `cond`; in a `both` table cond computes and uncond shares.

    Text rows of a joint attention stay exact. `max_age` bounds the age of the stored difference in steps.
    """

    difference: bool = True
    max_age: int = 2
    order: int = 0

    seams: ClassVar[frozenset[str]] = frozenset({"attention", "timeline"})
    computes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.max_age < 0:
            raise ValueError(f"max_age must be a number of steps >= 0; got {self.max_age}")
        if not 0 <= self.order <= (MOST if self.difference else 0):
            raise ValueError(f"order must be from 0 to {MOST}, and 0 without difference; got {self.order}")

    @property
    def nodes(self) -> int:
        """Stored differences that one answer reads."""
        return self.order + 1 if self.difference else 0

    def weights(self, level: float, nodes: Sequence[float]) -> tuple[float, ...]:
        """One weight for each stored difference, newest first; `nodes` are their noise levels."""
        return extrapolation.weights("lagrange", level, nodes)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        visual = visit.recall_from_cond("shared")
        if self.difference:
            visual = visual + visit.recall("difference", self.max_age)
        return visit.with_exact_text(visual)
