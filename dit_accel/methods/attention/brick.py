"""Brick attention: a block of tokens attends to the bricks around it.

Source: sliding tile attention, Zhang et al. 2025, arXiv:2502.04507, as in VORTA, arXiv:2505.18809; here with
    bricks that are kernel blocks on any grid, and extents that may be rules of the grid as in
    MoA, Fu et al. 2024, arXiv:2406.14909. Text sees all and is seen by all.
Keeps: nothing.
Exact when: the extent covers the grid.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.block_heads import Near, Part, Rules
from dit_accel.bricks import Grid
from dit_accel.methods.attention.base import check
from dit_accel.visit import AttentionVisit


@dataclass(frozen=True)
class Brick:
    """Attend within `extent` = (frames, rows, columns) bricks on each side; an axis may have a rule.

    `brick` is its size in tokens, by default 128 tokens that fit the grid.
    """

    extent: Rules
    brick: Grid | None = None

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self.near  # checks the extent and the brick

    @property
    def near(self) -> Near:
        return Near(extent=self.extent, brick=self.brick)

    def brick_on(self, grid: Grid) -> Grid:
        """The brick in whose order its tokens may stand."""
        return self.near.brick_on(grid)

    def work(self, grid: Grid, num_text: int) -> float:
        """The share of all pairs of query and key that is computed."""
        return self.near.density(grid, num_text)

    def part(self, visit: AttentionVisit) -> Part:
        """The bricks around."""
        check(visit, self.near)
        return Part(self.near)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.attend_blocks(self.part(visit))
