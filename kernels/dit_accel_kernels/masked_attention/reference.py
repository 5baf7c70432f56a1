"""The meaning of masked_attention in plain PyTorch: the oracle for every other backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.masked_attention.masks import Mask, rows_of

SCORES_AT_ONCE = 1 << 24  # 64 MiB in float32: longer sequences go through in chunks of queries


def why_not(**tensors: Any) -> None:
    """Takes anything."""


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Sequence[Mask], scale: float
) -> tuple[Tensor, Tensor]:
    B, Nq, H, _ = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)  # float64 stays float64
    k_t = k.permute(0, 2, 3, 1).to(compute)  # [B, H, D, Nk]
    v_h = v.transpose(1, 2).to(compute)  # [B, H, Nk, D]
    chunk = max(1, SCORES_AT_ONCE // max(1, B * H * k.shape[1]))
    parts = []
    for start in range(0, max(Nq, 1), chunk):
        rows = q[:, start : start + chunk].transpose(1, 2).to(compute)  # [B, H, chunk, D]
        keep = _keep(mask, start, min(start + chunk, Nq), q.device)
        parts.append(_attend(rows, k_t, v_h, keep, scale))
    out = torch.cat([part for part, _ in parts], dim=2).transpose(1, 2)  # [B, Nq, H, D]
    lse = torch.cat([part for _, part in parts], dim=2).transpose(1, 2)  # [B, Nq, H]
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _keep(mask: Mask | Sequence[Mask], start: int, stop: int, device: torch.device) -> Tensor | None:
    """The mask's rows: bool, broadcasts to [B, H, rows, Nk]; None keeps everything."""
    if mask is None:
        return None
    if not isinstance(mask, Sequence):
        return rows_of(mask, start, stop, device)
    everything = torch.ones(1, 1, dtype=torch.bool, device=device)
    heads = [everything if each is None else rows_of(each, start, stop, device) for each in mask]
    heads = [
        head.reshape((1,) * (4 - head.ndim) + head.shape) for head in heads
    ]  # each [B or 1, 1, rows, Nk]
    return torch.cat(torch.broadcast_tensors(*heads), dim=1)


def _attend(q: Tensor, k_t: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k_t) * scale  # [B, H, rows, Nk]
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    # an empty row has a maximum of -inf, and -inf - -inf is NaN: shift it by 0 instead
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)  # [B, H, rows, 1]
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1.0)  # [B, H, rows, D]
    return out, (top + total.log()).squeeze(-1)
