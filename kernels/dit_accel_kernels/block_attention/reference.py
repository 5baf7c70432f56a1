"""The meaning of block_attention in plain PyTorch: the oracle for every other backend."""

from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.parts import attend, bias_of, finish
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
    bias = bias_of(q, k, key_bias, valid_keys)  # [B, H or 1, Nk]
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
                attend(q[:, part, head], k[:, :, head], v[:, :, head], head_bias, seen, scale)
                for seen in (keep if kind in EMITS else keep[:1])
            ]
            kept = None if cached is None else cached[:, part, slot[head]]
            kept_lse = None if cached_lse is None else cached_lse[:, part, slot[head]]
            result, row_lse = finish(kind, attended, kept, kept_lse)
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
