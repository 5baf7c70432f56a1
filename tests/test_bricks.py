"""Brick order: every token once, every block a box, every window kept whole."""

from itertools import product
from math import prod

import pytest
import torch

from dit_accel.bricks import BLOCK, BRICKS, best_brick, lay_bricks, reach
from dit_accel_kernels.masked_attention import window_mask

GRIDS = [(1, 1, 1), (21, 30, 52), (9, 16, 16), (1, 32, 32), (5, 7, 3)]
SMALL = [grid for grid in GRIDS if prod(grid) <= 2304]  # where a mask over tokens is written out
SHAPES = [None, (4, 4, 8), (2, 2, 2), (1, 1, 1)]


def blocks_of(layout) -> torch.Tensor:
    """The block of each place: [N]."""
    return torch.repeat_interleave(layout.starts.diff().long())


@pytest.mark.parametrize("num_text", [0, 7, 333])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_token_stands_in_one_block(grid, num_text):
    layout = lay_bricks(grid, num_text)
    tokens = prod(grid) + num_text
    for text_first in (False, True):
        assert torch.equal(layout.permutation(text_first).sort().values, torch.arange(tokens))
    sizes = layout.starts.diff()
    assert layout.starts[0] == 0 and layout.starts[-1] == tokens
    assert sizes.min() >= 1 and sizes.max() <= BLOCK == layout.block
    visual = len(layout.boxes)
    assert (sizes[: visual - 1] == BLOCK).all(), "only the last visual block is shorter"
    assert layout.starts[visual] == prod(grid), "text stands in blocks of its own"


def test_text_stands_behind_in_its_own_order():
    layout = lay_bricks((1, 2, 2), 3, (1, 1, 2))
    assert layout.permutation(text_first=True).tolist() == [3, 4, 5, 6, 0, 1, 2]
    assert layout.permutation(text_first=False).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert layout.starts.tolist() == [0, 2, 4, 6, 7]


def test_the_order_is_bricks_to_and_fro_with_raster_inside():
    layout = lay_bricks((1, 4, 4), 0, (1, 2, 2))
    assert layout.order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 10, 11, 14, 15, 8, 9, 12, 13]
    assert layout.boxes[2].tolist() == [[0, 2, 2], [0, 3, 3]]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_box_is_tight_around_its_tokens(grid):
    layout = lay_bricks(grid)
    frames, rows, columns = torch.unravel_index(layout.order, grid)
    for number, (start, stop) in enumerate(zip(layout.starts[:-1], layout.starts[1:], strict=True)):
        inside = torch.stack([axis[start:stop] for axis in (frames, rows, columns)])
        assert layout.boxes[number].tolist() == [inside.amin(1).tolist(), inside.amax(1).tolist()]


@pytest.mark.parametrize("brick", SHAPES)
@pytest.mark.parametrize("grid", SMALL)
def test_lists_are_symmetric_and_hold_their_own_block(grid, brick):
    layout = lay_bricks(grid, 5, brick)
    for size in [(0, 0, 0), (1, 1, 1), (0, 2, 1)]:
        for near in (layout.within_tokens(size), layout.within_bricks(size)):
            assert near.shape == (len(layout.starts) - 1,) * 2
            assert near.diagonal().all() and torch.equal(near, near.T)
            assert near[len(layout.boxes) :].all() and near[:, len(layout.boxes) :].all()


@pytest.mark.parametrize("brick", SHAPES)
@pytest.mark.parametrize("grid", SMALL)
def test_what_covers_the_grid_keeps_everything(grid, brick):
    layout = lay_bricks(grid, 0, brick)
    assert layout.within_tokens([n - 1 for n in grid]).all()
    assert layout.within_bricks([n - 1 for n in grid]).all()
    assert layout.within_bricks([(0, 1.0)] * 3).all()
    if (len(layout.boxes) > 1 and layout.block > 1) or prod(grid) > BLOCK:
        assert not layout.within_tokens([0, 0, 0]).all()


@pytest.mark.parametrize("brick", SHAPES)
@pytest.mark.parametrize("radius", [(0, 0, 0), (1, 1, 1), (0, 3, 2), (2, 0, 9)])
@pytest.mark.parametrize("grid", SMALL)
def test_a_window_on_blocks_holds_the_window_on_tokens(grid, radius, brick):
    for text_first in (False, True):
        layout = lay_bricks(grid, 3, brick)
        order, block = layout.permutation(text_first), blocks_of(layout)
        tokens = window_mask(grid, radius, 3, text_first)[order][:, order]
        kept = layout.within_tokens(radius)[block][:, block]
        assert (kept | ~tokens).all()
        if layout.block == 1:
            assert torch.equal(kept, tokens), "blocks of one token are the window itself"


@pytest.mark.parametrize("extent", [(0, 0, 0), (1, 0, 1), (2, 1, 1)])
def test_bricks_that_fit_are_counted_as_coordinates(extent):
    grid, brick = (16, 8, 16), (4, 4, 8)
    layout = lay_bricks(grid, 0, brick)
    numbers = [box // torch.tensor(brick) for box in layout.boxes[:, 0]]
    near = layout.within_bricks(extent)
    for i, j in product(range(len(numbers)), repeat=2):
        assert near[i, j] == bool(((numbers[i] - numbers[j]).abs() <= torch.tensor(extent)).all())


@pytest.mark.parametrize(
    ("rule", "n", "value"),
    [(2, 99, 2), ((1, 0.25), 8, 3), ((0, 0.29), 100, 29), ((-4, 0.5), 4, 0), ((0, 0.5), 5, 2)],
)
def test_an_extent_may_be_a_rule_of_the_axis(rule, n, value):
    assert reach(rule, n) == value


def test_rules_count_tokens_for_windows_and_bricks_for_bricks():
    layout = lay_bricks((8, 8, 16), 0, (4, 4, 8))
    half = [(0, 0.5)] * 3
    assert torch.equal(layout.within_tokens(half), layout.within_tokens([4, 4, 8]))
    assert torch.equal(layout.within_bricks(half), layout.within_bricks([1, 1, 1]))


@pytest.mark.parametrize(
    ("grid", "brick"),
    [
        ((16, 32, 32), (4, 4, 8)),
        ((1, 32, 32), (1, 8, 16)),
        ((2, 32, 32), (2, 8, 8)),
    ],
)
def test_the_brick_is_compact_and_fits_the_grid(grid, brick):
    assert brick in BRICKS and best_brick(grid) == brick


def test_consecutive_blocks_of_a_ragged_grid_stay_compact():
    """Walked from the left end of every line instead, the mean box holds 481 tokens."""
    boxes = lay_bricks((21, 30, 52), 0, (4, 4, 8)).boxes
    assert (boxes[:, 1] - boxes[:, 0] + 1).prod(-1).float().mean() < 180


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 1, 1),), "at least one token per axis"),
        (((1, 1, 1), -1), "at least one token per axis"),
        (((9, 9, 9), 0, (4, 8, 8)), r"a brick has 1 to 128 tokens; got \(4, 8, 8\): 256"),
        (((9, 9, 9), 0, (0, 8, 8)), "a brick has 1 to 128 tokens"),
    ],
)
def test_what_is_no_grid_or_brick_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lay_bricks(*arguments)
