"""Window attention: a visual token attends to the box of tokens around it.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.2 (there a 1-D band; here the box
    |df| <= frames, |dr| <= rows, |dc| <= columns of the token grid, so that a video keeps its neighbours).
    Where text shares the sequence it sees all and is seen by all, as in DiTFastAttnV2.
Keeps: nothing.
Exact when: the radius covers the grid.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.visit import AttentionVisit, Unmet
from dit_accel_kernels.block_attention import Window as Rule
from dit_accel_kernels.block_attention import block_attention


@dataclass(frozen=True)
class Window:
    """Attend within `radius` = (frames, rows, columns) tokens on each side."""

    radius: tuple[int, int, int]

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.radius) < 0:
            raise ValueError(f"radius must be three numbers >= 0 (frames, rows, columns); got {self.radius}")

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        window = Rule(visit.grid, self.radius, visit.num_text, visit.text_first)
        if visit.mask is None:
            return block_attention(visit.q, visit.k, visit.v, mask=window, scale=visit.scale)[0]
        return torch.cat([self._masked(visit, window, sample) for sample in range(visit.q.shape[0])])

    @staticmethod
    def _masked(visit: AttentionVisit, window: Rule, sample: int) -> Tensor:  # [1, N, h, D]
        """One sample of a batch whose padded text is masked."""
        mask = visit.mask
        if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
            raise Unmet("its attention mask is not a bool mask over keys [B, 1, 1 or N, N]")
        seen = mask[sample if mask.shape[0] > 1 else 0, 0]  # [1 or N, N]
        both = window.rows(0, window.shape[0], visit.q.device) & seen
        q, k, v = (x[sample : sample + 1] for x in (visit.q, visit.k, visit.v))
        return block_attention(q, k, v, mask=both, scale=visit.scale)[0]
