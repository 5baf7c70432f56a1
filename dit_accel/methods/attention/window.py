"""Window attention: a visual token attends to the box of tokens around it.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.2 (there a 1-D band; here the box
    |df| <= frames, |dr| <= rows, |dc| <= columns of the token grid, so that video keeps its neighbours).
Keeps: nothing. In a joint sequence the text rows stay exact.
Exact when: the radius covers the grid and the sequence holds no text.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.visit import AttentionVisit, Unmet
from dit_accel_kernels.block_attention import block_attention, window_mask


@dataclass(frozen=True)
class Window:
    """Attend within `radius` = (frames, rows, columns) tokens on each side."""

    radius: tuple[int, int, int]

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    text_in_window: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.radius) < 0:
            raise ValueError(f"radius must be three numbers >= 0 (frames, rows, columns); got {self.radius}")

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        if visit.mask is not None and visit.mask.dtype.is_floating_point:
            raise Unmet("its attention carries an additive mask")
        mask = window_mask(
            visit.grid,
            self.radius,
            num_text=visit.num_text,
            text_first=visit.text_first,
            text_visible=self.text_in_window,
            device=visit.q.device,
        )
        if visit.mask is not None:
            mask = mask & visit.mask
        out, _ = block_attention(visit.q, visit.k, visit.v, mask=mask, scale=visit.scale)
        return out
