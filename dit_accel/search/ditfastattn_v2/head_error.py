"""How wrong a candidate's output of a head is: against the head itself, or through the output projection.

head        RSE of DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.3, before the projection:
            sum (y_m - y)^2 / sum (y - mean y)^2, sums and mean over samples, tokens and channels
projected   ours: |W_o[:, h] (y_m - y)_h|^2 / |W_o y|^2, the share of the layer's own output. A head that
            the projection hardly lets through may err more, and errors of heads add up to the layer's as
            long as they are independent.
felt        ours: a share of the mean squared error of the frames, see `felt_error`
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_accel.errors import BadUsage

ERRORS = ("projected", "head", "felt")


def rse(y: Tensor, other: Tensor) -> Tensor:
    """RSE of every head of `other` against y, both [B, N, h, D]: float64 [h]."""
    y, other = y.double(), other.double()
    off = (other - y).square().sum((0, 1, 3))
    spread = (y - y.mean((0, 1, 3), keepdim=True)).square().sum((0, 1, 3))
    return off / spread.clamp_min(torch.finfo(torch.float64).tiny)


class _Linear:
    """A projection of heads without its bias, whatever a quantizer or LoRA made of it."""

    def __init__(self, module: nn.Module, heads: int, like: Tensor):
        self.module = module
        unit = torch.eye(heads * like.shape[3], dtype=like.dtype, device=like.device)
        columns = self(unit).float().unflatten(0, (heads, -1))  # [H, D, C]
        self.grams = columns @ columns.transpose(1, 2)  # [H, D, D] float32: W_h^T W_h

    def __call__(self, x: Tensor) -> Tensor:  # [..., H D] -> [..., C]
        if type(self.module) is nn.Linear and self.module.weight.device == x.device:
            return F.linear(x, self.module.weight)
        # its weight may not be there to be read: what it does is asked of it
        return self.module(x) - self.module(torch.zeros_like(x[:1]))

    def size(self, y: Tensor) -> float:
        """|W y|^2 of all heads: y [B, N, H, D]."""
        return float(self(y.flatten(0, 1).flatten(1)).square().sum(dtype=torch.float64))

    def off(self, difference: Tensor, heads: list[int]) -> Tensor:
        """|W_h d_h|^2 of some heads: difference [B, N, h, D] -> float64 [h]."""
        d = difference.float().permute(2, 0, 1, 3).flatten(1, 2)  # [h, B N, D]
        return ((d @ self.grams[heads]) * d).sum((1, 2), dtype=torch.float64)


class Projected:
    """The projected error of one layer. Text rows go through a projection of their own where there is one."""

    def __init__(self, attention: Any, like: Tensor):
        linear = projection_of(attention)
        heads = like.shape[2]
        self.visual = _Linear(linear, heads, like)
        own = getattr(attention, "to_add_out", None)
        self.text = self.visual if own is None else _Linear(own, heads, like)

    def errors(self, y: Tensor, other: Tensor, heads: list[int], text: slice) -> Tensor:
        """Errors [h] of `heads`, which other [B, N, h, D] holds, against y [B, N, H, D]; `text` are rows."""
        difference = other - y[:, :, heads]
        off, size = torch.zeros(len(heads), dtype=torch.float64, device=y.device), 0.0
        for linear, rows in self._parts(y.shape[1], text):
            off += linear.off(difference[:, rows], heads)
            size += linear.size(y[:, rows])
        return off / max(size, torch.finfo(torch.float64).tiny)

    def _parts(self, rows: int, text: slice) -> list[tuple[_Linear, slice]]:
        if text.start == text.stop or self.text is self.visual:
            return [(self.visual, slice(0, rows))]
        visual = slice(text.stop, rows) if text.start == 0 else slice(0, text.start)
        return [(self.visual, visual), (self.text, text)]


def projection_of(attention: Any) -> nn.Module:
    """The output projection of an attention module. Raises BadUsage where it has none of its own."""
    found = getattr(attention, "to_out", None)
    linear = found[0] if isinstance(found, nn.ModuleList | nn.Sequential) else found
    if not isinstance(linear, nn.Module):
        raise BadUsage(
            f"asked for errors of projected heads; {type(attention).__name__} has no output projection of "
            "its own. Ask for --error head."
        )
    return linear
