"""history_mix in PyTorch's own operations, where these round once too and `auto` is free to take them.

One y is one operation of PyTorch, which rounds once in any dtype and moves no more memory than a kernel of
ours. More are a chain, which rounds once in float32 only, and moves more; but a call of the C backend costs
20 to 30 us more than one of PyTorch. `scripts/bench_op.py history_mix` measures both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 320 << 10  # numbers of `out` for each thread up to which a chain in float32 is faster on a CPU


def is_faster(out: Tensor, ys: Sequence[Tensor], x: Tensor | None, gate: Tensor | None) -> bool:
    """Whether PyTorch's own operations mean the same on these tensors and are faster."""
    given = [t for t in (x, gate) if t is not None]
    if out.device.type != "cpu" or any(t.dtype != out.dtype for t in (*ys, *given)):
        return False
    if len(ys) == 1 and (x is not None or gate is None):
        return True
    return out.dtype == torch.float32 and out.numel() <= FEW * torch.get_num_threads()


def mix(
    out: Tensor, ys: Sequence[Tensor], weights: Sequence[float], x: Tensor | None, gate: Tensor | None
) -> None:
    """Fills `out`, which may be x."""
    one = len(ys) == 1
    if x is None:
        total = _sum(ys, weights, out)
        if gate is not None:
            total.mul_(gate)
    elif gate is None:
        torch.add(x, ys[0] if one else _sum(ys, weights), alpha=weights[0] if one else 1, out=out)
    else:
        torch.addcmul(x, gate, ys[0] if one else _sum(ys, weights), value=weights[0] if one else 1, out=out)


def _sum(ys: Sequence[Tensor], weights: Sequence[float], out: Tensor | None = None) -> Tensor:
    total = torch.mul(ys[0], weights[0], out=out)
    for y, weight in zip(ys[1:], weights[1:], strict=True):
        total.add_(y, alpha=weight)
    return total
