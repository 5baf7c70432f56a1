"""Tail: near blocks are attended at every step, what is far is merged from an earlier full pass.

Source: ours, from the residual of DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.2, and the merge
    of partial softmaxes of flash attention, arXiv:2205.14135, section 3.1:

        out(t) = merge(near part at t, far part of step a),     a = last anchor, t - a <= max_age

    so the weights of near and far follow the near scores, which an added residual cannot.
Keeps: per site, branch and head the far part [B, N, D] and its log-sum-exp [B, N] in float32.
Exact when: the near set covers the grid, or max_age = 0 (every step computes).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.block_heads import Part
from dit_accel.methods.attention.base import Anchored, check
from dit_accel.timeline import TAIL, TAIL_LSE
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind


@dataclass(frozen=True)
class Tail(Anchored):
    """Attend to what is near, merge what is far: the parameters are those of `Anchored`."""

    keeps: ClassVar[tuple[str, ...]] = (TAIL, TAIL_LSE)

    def part(self, visit: AttentionVisit) -> Part:
        """Near blocks, merged with the far part of the anchor; MissingAnchor without one."""
        check(visit, self.near, Kind.MERGE)
        far, far_lse = visit.recall(TAIL, self.max_age), visit.recall(TAIL_LSE, self.max_age)
        return Part(self.near, Kind.MERGE, far, far_lse.squeeze(3))

    def anchor_part(self, visit: AttentionVisit) -> Part:
        """Full attention; the far part is left behind without attending anything twice."""
        check(visit, self.near, Kind.EMIT_TAIL)

        def keep(far: Tensor, far_lse: Tensor | None) -> None:
            assert far_lse is not None
            visit.keep(TAIL, far)
            visit.keep(TAIL_LSE, far_lse.unsqueeze(3))

        return Part(self.near, Kind.EMIT_TAIL, keep=keep)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.attend_blocks(self.part(visit))
