"""Window attention: a visual token attends to the box of tokens around it.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3.2 (there a 1-D band; here the box
    |df| <= frames, |dr| <= rows, |dc| <= columns of the token grid, so that a video keeps its neighbours).
    Where text shares the sequence it sees all and is seen by all, as in DiTFastAttnV2. Blocks of tokens
    that hold a pair of the box are attended whole, as in the paper's kernel: a superset of the box, and
    all that a kernel can make fast.
Keeps: nothing.
Exact when: the radius covers the grid.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.block_heads import Near, Part, Rules
from dit_accel.bricks import Grid, reach
from dit_accel.errors import Unmet
from dit_accel.methods.attention.base import check
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.masked_attention import WindowMask, masked_attention


@dataclass(frozen=True)
class Window:
    """Attend within `radius` = (frames, rows, columns) tokens on each side; an axis may have a rule.

    `mask = "tokens"` keeps exactly the pairs of the box: slow, for studies of what rounding to blocks adds.
    `brick` is the size of a block in tokens, by default 128 tokens that fit the grid.
    """

    radius: Rules
    mask: Literal["blocks", "tokens"] = "blocks"
    brick: Grid | None = None

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mask not in ("blocks", "tokens"):
            raise ValueError(f'mask must be "blocks" or "tokens"; got {self.mask!r}')
        _ = self.near  # checks the radius and the brick

    @property
    def near(self) -> Near:
        return Near(radius=self.radius, brick=self.brick)

    def brick_on(self, grid: Grid) -> Grid | None:
        """The brick in whose order its tokens may stand; None: only the model's own order serves."""
        return self.near.brick_on(grid) if self.mask == "blocks" else None

    def work(self, grid: Grid, num_text: int) -> float:
        """The share of all pairs of query and key that is computed."""
        return self.near.density(grid, num_text)

    def part(self, visit: AttentionVisit) -> Part | None:
        """The blocks around; None where the window is one of tokens, which no list of blocks can say."""
        if self.mask == "tokens":
            return None
        check(visit, self.near)
        return Part(self.near)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        part = self.part(visit)
        return self._attend_tokens(visit) if part is None else visit.attend_blocks(part)

    def _attend_tokens(self, visit: AttentionVisit) -> Tensor:
        if visit.brick is not None:
            raise Unmet("its tokens stand in brick order, a window of tokens needs the model's own")
        frames, rows, columns = (reach(rule, n) for rule, n in zip(self.radius, visit.grid, strict=True))
        mask = WindowMask(visit.grid, (frames, rows, columns), visit.num_text, visit.text_first)
        if visit.mask is not None:
            if visit.mask.dtype != torch.bool:
                raise Unmet("its attention adds a bias to the scores")
            mask = mask & visit.mask
        return masked_attention(visit.q, visit.k, visit.v, mask=mask, scale=visit.scale)[0]
