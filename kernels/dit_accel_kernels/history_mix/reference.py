"""history_mix in plain PyTorch: the law for every other backend, on any device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def why_not(**tensors: Any) -> None:
    """It takes everything."""


def history_mix(
    out: Tensor,
    ys: Sequence[Tensor],
    weights: Sequence[float],
    x: Tensor | None,
    gate: Tensor | None,
    scales: Sequence[Tensor | None],
) -> None:
    """Fills `out`; sums are float32, or float64 where a tensor is."""
    given = [t for t in (out, *ys, x, gate) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    sum_ = None
    for y, weight, scale in zip(ys, weights, scales, strict=True):
        y = y.to(dtype) if scale is None else y.to(dtype) * scale
        sum_ = y * weight if sum_ is None else torch.add(sum_, y, alpha=weight)
    assert sum_ is not None, "the op leaves at least one y"
    if gate is not None:
        sum_ = sum_ * gate.to(dtype)
    out.copy_(sum_ if x is None else sum_ + x.to(dtype))
