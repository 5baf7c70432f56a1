"""Errors of heads against their formulas by hand, with biases, LoRA-like projections and text of its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dit_accel.errors import BadUsage
from dit_accel.search.ditfastattn_v2.head_error import Projected, rse

SHAPE = 2, 11, 3, 8  # B, N, H, D
NO_TEXT = slice(11, 11)


class Attention(nn.Module):
    """The projections of an attention module."""

    def __init__(self, text: bool = False):
        super().__init__()
        self.to_out = nn.ModuleList([nn.Linear(24, 20), nn.Dropout(0.0)])
        self.to_add_out = nn.Linear(24, 20) if text else None


class Adapted(nn.Module):
    """A linear layer whose weight nobody can read, as with an adapter or a quantizer."""

    def __init__(self, linear):
        super().__init__()
        self.inner, self.more = linear, nn.Linear(24, 20, bias=False)

    def forward(self, x):
        return self.inner(x) + self.more(x)


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    y = torch.randn(SHAPE) + 0.5
    return y, y + 0.1 * torch.randn(SHAPE)


def share(weight, y, other, head):
    """|W_h (other - y)_h|^2 and |W y|^2."""
    part = weight[:, head * 8 : head * 8 + 8]
    return F.linear((other - y)[:, :, head], part).square().sum(), F.linear(
        y.flatten(2), weight
    ).square().sum()


@torch.no_grad()
def test_rse_is_against_the_spread_of_the_head(outputs):
    y, other = outputs
    for head, found in enumerate(rse(y, other).tolist()):
        own = y[:, :, head]
        by_hand = (other[:, :, head] - own).square().sum() / (own - own.mean()).square().sum()
        assert found == pytest.approx(float(by_hand), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_projected_is_the_share_of_the_layers_output(adapted, outputs):
    y, other = outputs
    attention = Attention()
    weight = attention.to_out[0].weight
    if adapted:
        attention.to_out[0] = Adapted(attention.to_out[0])
        weight = weight + attention.to_out[0].more.weight
    found = Projected(attention, y).errors(y, other[:, :, [0, 2]], [0, 2], NO_TEXT)
    for head, error in zip((0, 2), found.tolist(), strict=True):
        off, size = share(weight, y, other, head)
        assert error == pytest.approx(float(off / size), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", [True, False])
def test_text_goes_through_its_own_projection(first, outputs):
    y, other = outputs
    attention = Attention(text=True)
    text = slice(0, 4) if first else slice(7, 11)
    visual = slice(4, 11) if first else slice(0, 7)
    found = Projected(attention, y).errors(y, other, [0, 1, 2], text)
    for head, error in enumerate(found.tolist()):
        parts = [
            share(linear.weight, y[:, rows], other[:, rows], head)
            for linear, rows in ((attention.to_out[0], visual), (attention.to_add_out, text))
        ]
        off, size = (sum(float(part[i]) for part in parts) for i in (0, 1))
        assert error == pytest.approx(off / size, rel=1e-4)


def test_a_layer_without_a_projection_is_refused():
    with pytest.raises(BadUsage, match="Ask for --error head"):
        Projected(nn.Identity(), torch.zeros(SHAPE))
