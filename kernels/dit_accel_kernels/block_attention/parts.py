"""Pieces of the op's meaning in plain PyTorch: `reference` is made of them, other backends borrow some."""

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.merge import merge
from dit_accel_kernels.block_attention.plan import Kind


def bias_of(q: Tensor, k: Tensor, key_bias: Tensor | None, valid_keys: Tensor | None) -> Tensor:
    """What is added to the scores: [B, H or 1, Nk], -inf for keys beyond a sample's length."""
    compute = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros(1, 1, k.shape[1], dtype=compute, device=q.device)
    if key_bias is not None:
        bias = bias + key_bias.to(compute)
    if valid_keys is not None:
        place = torch.arange(k.shape[1], device=q.device)
        bias = bias.masked_fill(place >= valid_keys.view(-1, 1, 1), float("-inf"))
    return bias.expand(q.shape[0], -1, -1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One head, some rows: out [B, rows, D] and lse [B, rows], in the computing dtype."""
    compute = bias.dtype
    scores = (q.to(compute) @ k.to(compute).transpose(1, 2)) * scale + bias  # [B, rows, Nk]
    # an unseen key may hold anything, and NaN - inf is NaN
    scores = scores.masked_fill(~keep | (bias == float("-inf")), float("-inf"))
    # an empty row has a maximum of -inf, and -inf - -inf is NaN: shift it by 0 instead
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    unseen = ~keep.any(dim=0) | (bias == float("-inf")).all(dim=1)  # [B, Nk]
    values = v.to(compute).masked_fill(unseen[..., None], 0.0)
    result = (weights @ values) / total.masked_fill(total == 0, 1.0)
    return result, (top + total.log()).squeeze(-1)


def finish(
    kind: Kind, attended: list[tuple[Tensor, Tensor]], cached: Tensor | None, cached_lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The head's result and lse from its near (and rest) part; writes what an emitting head keeps."""
    near, near_lse = attended[0]
    if kind is Kind.ATTEND:
        return near, near_lse
    assert cached is not None  # checked by the op
    if kind is Kind.ADD:
        return near + cached.to(near.dtype), near_lse
    if kind is Kind.MERGE:
        assert cached_lse is not None
        return merge(near, near_lse, cached.to(near.dtype), cached_lse.to(near.dtype))
    rest, rest_lse = attended[1]
    full, full_lse = merge(near, near_lse, rest, rest_lse)
    if kind is Kind.EMIT_TAIL:
        assert cached_lse is not None
        cached.copy_(rest)
        cached_lse.copy_(rest_lse)
    else:
        cached.copy_(full - near)
    return full, full_lse
