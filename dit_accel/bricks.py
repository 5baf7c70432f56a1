"""Tokens in brick order: near tokens stand together, so that a block of keys is a box of the grid.

A grid (frames, rows, columns) is walked brick by brick. Edge bricks are clipped, the tokens packed without
gaps and cut into blocks of one brick's tokens; only the last block is shorter, and any grid works. Padding
21x30x52 to whole 4x4x8 bricks would cost 31 % more tokens. Every block knows its bounding box, and two
blocks are near where the gap between their boxes is at most an extent on each axis: windows are defined on
blocks, so that a kernel, its reference and a search mean the same pairs. Text stands behind the visual
tokens in blocks of its own; it sees all and is seen by all.

Sources: sliding tile attention (arXiv:2502.04507) for tiles that are kernel blocks; packing of
clipped bricks and boxes instead of tile coordinates is ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]  # frames, rows, columns
Rule = int | tuple[float, float]  # so many, or alpha + beta * n of an axis with n (MoA, arXiv:2406.14909)

BLOCK = 128  # tokens in a block of the kernels
# from compact to flat: of equally good ones the first is taken
BRICKS: tuple[Grid, ...] = (
    (4, 4, 8), (4, 8, 4), (8, 4, 4), (2, 8, 8), (2, 4, 16), (2, 16, 4), (1, 8, 16), (1, 16, 8),
)  # fmt: skip
HALO = 2  # tokens on each side of a box that count when bricks are compared


@dataclass(frozen=True, eq=False)
class BrickLayout:
    """Where the tokens of a grid, and of text behind it, stand in brick order."""

    grid: Grid
    brick: Grid
    num_text: int
    order: Tensor  # [V] int64: the raster number of the visual token at each place
    starts: Tensor  # [NB + 1] int32: first place of each block, visual blocks and then text blocks
    boxes: Tensor  # [NV, 2, 3] int64: first and last frame, row and column of each visual block

    @property
    def block(self) -> int:
        """The most tokens that a block has."""
        return math.prod(self.brick)

    def permutation(self, text_first: bool) -> Tensor:
        """[V + T] int64: the place in the model's sequence ([text, visual] or [visual, text]) of each token
        in brick order."""
        visual = len(self.order)
        text = torch.arange(self.num_text) + (0 if text_first else visual)
        return torch.cat([self.order + (self.num_text if text_first else 0), text])

    def text_first(self) -> Tensor:
        """[NB] int64: the blocks with those of the text before the visual ones."""
        visual = len(self.boxes)
        return torch.cat([torch.arange(visual, len(self.starts) - 1), torch.arange(visual)])

    def within_tokens(self, radius: Sequence[Rule]) -> Tensor:
        """Blocks whose boxes are at most `radius` tokens apart on each axis: bool [NB, NB].

        It keeps every pair of tokens that a window of this radius keeps, and those that share their blocks.
        """
        return self._near(self.boxes, [reach(rule, n) for rule, n in zip(radius, self.grid, strict=True)])

    def within_bricks(self, extent: Sequence[Rule]) -> Tensor:
        """Blocks whose boxes are at most `extent` bricks apart on each axis: bool [NB, NB].

        Neighbours are 1 apart. A block that was packed over the edge of a brick lies in both.
        """
        counts = [math.ceil(n / size) for n, size in zip(self.grid, self.brick, strict=True)]
        bricks = self.boxes // torch.tensor(self.brick)
        return self._near(bricks, [reach(rule, n) for rule, n in zip(extent, counts, strict=True)])

    def _near(self, boxes: Tensor, reaches: Sequence[int]) -> Tensor:
        first, last = boxes[:, 0], boxes[:, 1]  # [NV, 3]
        gap = torch.maximum(first[None] - last[:, None], first[:, None] - last[None])  # below 0: they overlap
        blocks, visual = len(self.starts) - 1, len(boxes)
        near = torch.ones(blocks, blocks, dtype=torch.bool)  # text rows and columns stay whole: an arrow
        near[:visual, :visual] = (gap <= torch.tensor(reaches)).all(-1)
        return near


def reach(rule: Rule, n: int) -> int:
    """A rule's value on an axis of length n: whole, rounded down, at least 0."""
    if isinstance(rule, tuple):
        alpha, beta = rule
        # 0.29 * 100 is 28.999999999999996: a rule that means 29 shall give it
        return max(0, math.floor(alpha + beta * n + 1e-9))
    return rule


@functools.lru_cache(maxsize=128)  # a run has few grids and text lengths; kept across runs, on the CPU
def lay_bricks(grid: Grid, num_text: int = 0, brick: Grid | None = None) -> BrickLayout:
    """The layout of a grid in bricks of this size, or of the size that fits it best.

    Raises ValueError for an empty grid, negative text, or a brick that is no block.
    """
    if min(grid) < 1 or num_text < 0:
        raise ValueError(f"bricks: a grid has at least one token per axis; got {grid} and {num_text} of text")
    if brick is not None and (min(brick) < 1 or math.prod(brick) > BLOCK):
        raise ValueError(f"bricks: a brick has 1 to {BLOCK} tokens; got {brick}: {math.prod(brick)}")
    brick = best_brick(grid) if brick is None else brick
    order = _order(grid, brick)
    block = math.prod(brick)
    visual, total = len(order), len(order) + num_text
    starts = [*range(0, visual, block), *range(visual, total, block), total]
    boxes = _boxes(_coordinates(order, grid), block)
    return BrickLayout(grid, brick, num_text, order, torch.tensor(starts, dtype=torch.int32), boxes)


@functools.lru_cache(maxsize=128)
def best_brick(grid: Grid) -> Grid:
    """The brick whose blocks have the fewest tokens around them.

    A window around a block is its box and a halo on each side. A brick that fits the grid badly packs blocks
    over its edges, which makes boxes larger; a flat brick has more halo. Both are counted here at once. The
    halo is not clipped at the edges of the grid: that would favour bricks along its short axis.
    """

    def around(brick: Grid) -> tuple[int, int]:
        boxes = _boxes(_coordinates(_order(grid, brick), grid), math.prod(brick))
        inside = math.prod(min(size, n) for size, n in zip(brick, grid, strict=True))
        # of equal ones the one that the grid clips least: its bricks are its blocks
        return int((boxes[:, 1] - boxes[:, 0] + 1 + 2 * HALO).prod(-1).sum()), -inside

    return min(BRICKS, key=around)


def _coordinates(tokens: Tensor, grid: Grid) -> Tensor:
    """Frame, row and column of raster numbers: [..., 3]."""
    _, rows, columns = grid
    return torch.stack([tokens // (rows * columns), tokens // columns % rows, tokens % columns], dim=-1)


def _order(grid: Grid, brick: Grid) -> Tensor:
    """Raster numbers of the tokens in brick order: [V]."""
    tokens = torch.arange(math.prod(grid))
    frame, row, column = (_coordinates(tokens, grid) // torch.tensor(brick)).unbind(-1)
    rows, columns = (math.ceil(n / size) for n, size in zip(grid[1:], brick[1:], strict=True))
    # to and fro like an ox at the plough: consecutive bricks touch, so blocks over an edge stay compact
    row = torch.where(frame % 2 == 0, row, rows - 1 - row)
    line = frame * rows + row
    column = torch.where(line % 2 == 0, column, columns - 1 - column)
    return torch.argsort(line * columns + column, stable=True)  # stable: raster order inside a brick


def _boxes(coordinates: Tensor, block: int) -> Tensor:
    """First and last coordinates of consecutive blocks: [V, 3] -> [ceil(V / block), 2, 3]."""
    missing = -len(coordinates) % block
    padded = torch.cat([coordinates, coordinates[-1:].expand(missing, 3)]).unflatten(0, (-1, block))
    return torch.stack([padded.amin(1), padded.amax(1)], dim=1)
