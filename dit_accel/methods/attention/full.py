"""Full attention: the pipeline's own dense call, untouched, or all blocks through a backend of ours.

Source: the model itself.
Keeps: nothing.
Exact when: always, bit by bit without `backend`; this is the baseline every other method is measured against.
    With `backend` it is the same attention to rounding, and counts as `full_<backend>` in the report.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.errors import Unmet
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.dispatch import BACKENDS, BackendUnavailable


@dataclass(frozen=True)
class Full:
    """The pipeline's own attention with its own arguments; or `backend`: "cpu", "triton", "auto", ..."""

    backend: str | None = None

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.backend not in (None, "auto", *BACKENDS):
            raise ValueError(f'backend must be one of auto, {", ".join(BACKENDS)}; got "{self.backend}"')

    @property
    def exact(self) -> bool:
        """Whether it is the model's own call, bit by bit."""
        return self.backend is None

    @property
    def counted_as(self) -> str:
        """Its name in the report: a backend did something, the model's own call did not."""
        return "full" if self.backend is None else f"full_{self.backend}"

    def __str__(self) -> str:
        return "Full()" if self.backend is None else f"Full(backend={self.backend!r})"

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        if self.backend is None:
            return visit.dense()
        q, k, v = visit.q, visit.k, visit.v
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise Unmet("block_attention has no backward and gradients are wanted")
        bias = visit.key_bias()
        plan = _plan(q.shape[1], k.shape[1], q.shape[2], q.device)
        try:
            return block_attention(
                q, k, v, plan, scale=visit.scale, key_bias=bias, backend=self.backend, lse_wanted=False
            )[0]
        except BackendUnavailable as error:
            raise Unmet(str(error)) from error


@functools.lru_cache(maxsize=32)  # a self- and a cross-attention per grid and prompt length
def _plan(queries: int, keys: int, heads: int, device: torch.device) -> BlockPlan:
    with torch.inference_mode(False):  # kept for later calls, which may be outside of inference mode
        q_starts, k_starts = starts_of(queries), starts_of(keys)
        everything = torch.ones(1, len(q_starts) - 1, len(k_starts) - 1, dtype=torch.bool)
        return plan_blocks(everything, q_starts, k_starts, [Kind.ATTEND] * heads, [0] * heads, device=device)
