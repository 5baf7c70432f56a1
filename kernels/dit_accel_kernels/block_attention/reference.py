"""The meaning of block_attention in plain PyTorch: the oracle for every other backend."""

from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.merge import merge
from dit_accel_kernels.block_attention.plan import EMITS, BlockPlan, Kind

SCORES_AT_ONCE = 1 << 24  # 64 MiB in float32: longer sequences go through in chunks of queries


def why_not(**tensors: Any) -> None:
    """Takes anything."""


def block_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    cached: Tensor | None,
    cached_lse: Tensor | None,
    key_bias: Tensor | None,
    valid_keys: Tensor | None,
) -> None:
    """Fills `out` and `lse`, and the slots of emitting heads in `cached` and `cached_lse`."""
    near, rest = _token_lists(plan)  # each bool [P, NQ, Nk]
    query_block = torch.repeat_interleave(plan.q_starts.diff().long())  # [Nq]
    bias = _bias(q, k, key_bias, valid_keys)  # [B, H or 1, Nk]
    pattern, slot = plan.pattern.tolist(), plan.slot.tolist()
    rows = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * k.shape[1]))
    for head, kind in enumerate(plan.kinds):
        if kind is Kind.SKIP:
            continue
        if kind is Kind.COPY:
            assert cached is not None  # checked by the op
            out[:, :, head] = cached[:, :, slot[head]].to(out.dtype)
            continue
        for start in range(0, q.shape[1], rows):
            part = slice(start, start + rows)
            keep = near[pattern[head], query_block[part]], rest[pattern[head], query_block[part]]
            head_bias = bias[:, head % bias.shape[1], None]  # [B, 1, Nk]
            attended = [
                _attend(q[:, part, head], k[:, :, head], v[:, :, head], head_bias, seen, scale)
                for seen in (keep if kind in EMITS else keep[:1])
            ]
            kept = None if cached is None else cached[:, part, slot[head]]
            kept_lse = None if cached_lse is None else cached_lse[:, part, slot[head]]
            result, row_lse = _finish(kind, attended, kept, kept_lse)
            out[:, part, head] = result.to(out.dtype)
            lse[:, part, head] = row_lse.to(lse.dtype)


def _token_lists(plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """The near and the rest list of each (pattern, query block) as tokens: bool [P, NQ, Nk]."""
    num_q, num_k = len(plan.q_starts) - 1, len(plan.k_starts) - 1
    rows, device = len(plan.split), plan.indices.device
    row = torch.repeat_interleave(plan.pointers.diff().long())  # [L]
    is_near = torch.arange(len(plan.indices), device=device) < plan.split.long()[row]
    lists = []
    for chosen in (is_near, ~is_near):
        blocks = torch.zeros(rows, num_k, dtype=torch.bool, device=device)
        blocks[row[chosen], plan.indices.long()[chosen]] = True
        tokens = blocks.repeat_interleave(plan.k_starts.diff().long(), dim=1)
        lists.append(tokens.unflatten(0, (-1, num_q)))
    return lists[0], lists[1]


def _bias(q: Tensor, k: Tensor, key_bias: Tensor | None, valid_keys: Tensor | None) -> Tensor:
    """What is added to the scores: [B, H or 1, Nk], -inf for keys beyond a sample's length."""
    compute = torch.promote_types(q.dtype, torch.float32)
    bias = torch.zeros(1, 1, k.shape[1], dtype=compute, device=q.device)
    if key_bias is not None:
        bias = bias + key_bias.to(compute)
    if valid_keys is not None:
        place = torch.arange(k.shape[1], device=q.device)
        bias = bias.masked_fill(place >= valid_keys.view(-1, 1, 1), float("-inf"))
    return bias.expand(q.shape[0], -1, -1)


def _attend(
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


def _finish(
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
