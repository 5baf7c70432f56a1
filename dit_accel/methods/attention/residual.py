"""Residual: near blocks are attended at every step, and what they missed at an earlier full pass is added.

Source: window attention with residual sharing (WA-RS) of DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552,
    section 3.2; the residual per head as in DiTFastAttnV2, arXiv:2503.22796:

        out(t) = near part at t + [ full(a) - near part(a) ],     a = last anchor, t - a <= max_age

    A trial on a small Wan found it better than `tail` where the near set spans time, worse where it is local.
Keeps: per site, branch and head the residual [B, N, D].
Exact when: the near set covers the grid, or max_age = 0 (every step computes).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.block_heads import Part
from dit_accel.methods.attention.base import Anchored, check
from dit_accel.timeline import RESIDUAL
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind


@dataclass(frozen=True)
class Residual(Anchored):
    """Attend to what is near, add what that missed: the parameters are those of `Anchored`."""

    keeps: ClassVar[tuple[str, ...]] = (RESIDUAL,)

    def part(self, visit: AttentionVisit) -> Part:
        """Near blocks, and the residual of the anchor added; MissingAnchor without one."""
        check(visit, self.near, Kind.ADD)
        return Part(self.near, Kind.ADD, visit.recall(RESIDUAL, self.max_age))

    def anchor_part(self, visit: AttentionVisit) -> Part:
        """Full attention; the residual is left behind without attending anything twice."""
        check(visit, self.near, Kind.EMIT_RESIDUAL)

        def keep(missed: Tensor, _: Tensor | None) -> None:
            visit.keep(RESIDUAL, missed)

        return Part(self.near, Kind.EMIT_RESIDUAL, keep=keep)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.attend_blocks(self.part(visit))
