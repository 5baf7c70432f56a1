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
from dit_accel_kernels.masked_attention import WindowMask, masked_attention


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
        mask = WindowMask(visit.grid, self.radius, visit.num_text, visit.text_first)
        if visit.mask is not None:
            if visit.mask.dtype != torch.bool:
                raise Unmet("its attention adds a bias to the scores")
            mask = mask & visit.mask
        return masked_attention(visit.q, visit.k, visit.v, mask=mask, scale=visit.scale)[0]
