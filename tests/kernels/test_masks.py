"""The window mask against its definition, token by token."""

import itertools

import pytest
import torch

from dit_accel_kernels.masked_attention import WindowMask, window_mask

GRID = (3, 4, 5)


def by_definition(grid, radius, num_text, text_first, text_visible):
    """A loop over all pairs of tokens."""
    visual = list(itertools.product(*map(range, grid)))
    tokens = [None] * num_text + visual if text_first else visual + [None] * num_text

    def sees(query, key):
        if query is None:
            return True
        if key is None:
            return text_visible
        return all(abs(a - b) <= reach for a, b, reach in zip(query, key, radius, strict=True))

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


@pytest.mark.parametrize("radius", [(0, 0, 0), (1, 1, 1), (0, 2, 9), (2, 3, 4)])
@pytest.mark.parametrize("text_first", [True, False], ids=["text_first", "text_last"])
@pytest.mark.parametrize("text_visible", [True, False], ids=["arrow", "window"])
@pytest.mark.parametrize("num_text", [0, 7])
def test_mask_keeps_the_box_and_the_text(radius, num_text, text_first, text_visible):
    mask = window_mask(GRID, radius, num_text, text_first, text_visible)

    assert torch.equal(mask, by_definition(GRID, radius, num_text, text_first, text_visible))


def test_rows_of_the_rule_are_rows_of_the_mask():
    rule = WindowMask(GRID, (1, 1, 1), num_text=7, text_first=False)

    assert torch.equal(rule.rows(5, 64), window_mask(GRID, (1, 1, 1), 7, text_first=False)[5:64])
    assert rule.shape == (67, 67)


def test_radius_that_covers_the_grid_keeps_everything():
    assert window_mask(GRID, (2, 3, 4), num_text=7).all()
    assert not window_mask(GRID, (2, 3, 3), num_text=7).all()


@pytest.mark.parametrize(
    "grid,radius,num_text", [((0, 4, 5), (1, 1, 1), 0), (GRID, (1, -1, 1), 0), (GRID, (1, 1, 1), -1)]
)
def test_impossible_windows_are_refused(grid, radius, num_text):
    with pytest.raises(ValueError, match="grid must be positive"):
        WindowMask(grid, radius, num_text)
