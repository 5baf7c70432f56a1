"""block_attention by plain PyTorch over gathered keys: where there is no compiler for `cpu`.

Each (head, query block) attends only the keys of its list, a slice where they are consecutive, so that the
work falls with the density; `reference` does the work of dense attention whatever the lists are. SDPA is of
no use here: on a CPU it returns no LSE.
"""

from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.plan import EMITS, BlockPlan, Kind
from dit_accel_kernels.block_attention.reference import _attend, _bias, _finish

Runs = list[tuple[int, int]]  # (start, end) of consecutive keys


def why_not(q: Tensor, plan: BlockPlan, **others: Any) -> str | None:
    """The reason why this backend cannot take these tensors, or None: lists are read on the host."""
    if q.device.type != "cpu" or plan.indices.device.type != "cpu":
        return f"q is on {q.device.type} and the plan on {plan.indices.device.type}, not on a CPU"
    return None


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
    bias = _bias(q, k, key_bias, valid_keys)  # [B, H or 1, Nk]
    starts, pattern, slot = plan.q_starts.tolist(), plan.pattern.tolist(), plan.slot.tolist()
    lists = _lists(plan)
    for head, row in plan.work.tolist():
        kind, part = plan.kinds[head], slice(starts[row], starts[row + 1])
        kept = None if cached is None else cached[:, part, slot[head]]
        kept_lse = None if cached_lse is None else cached_lse[:, part, slot[head]]
        if kind is Kind.COPY:
            assert kept is not None
            out[:, part, head] = kept.to(out.dtype)
            continue
        near_and_rest = lists[pattern[head] * (len(starts) - 1) + row]
        tensors = q[:, part, head], k[:, :, head], v[:, :, head], bias[:, head % bias.shape[1]]
        attended = [
            _attend_runs(*tensors, runs, scale)
            for runs in (near_and_rest if kind in EMITS else near_and_rest[:1])
        ]
        result, row_lse = _finish(kind, attended, kept, kept_lse)
        out[:, part, head] = result.to(out.dtype)
        lse[:, part, head] = row_lse.to(lse.dtype)


def _lists(plan: BlockPlan) -> list[tuple[Runs, Runs]]:
    """Near and rest of every row of the plan as runs of keys."""
    starts, indices = plan.k_starts.tolist(), plan.indices.tolist()
    pointers, split = plan.pointers.tolist(), plan.split.tolist()
    return [
        (_runs(indices[first:middle], starts), _runs(indices[middle:last], starts))
        for first, middle, last in zip(pointers, split, pointers[1:], strict=False)
    ]


def _runs(blocks: list[int], starts: list[int]) -> Runs:
    runs: Runs = []
    for block in blocks:
        if runs and runs[-1][1] == starts[block]:
            runs[-1] = (runs[-1][0], starts[block + 1])
        else:
            runs.append((starts[block], starts[block + 1]))
    return runs


def _attend_runs(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor]:
    """Out [B, rows, D] and lse [B, rows] of rows of one head over some runs of its keys."""
    if not runs:
        empty = torch.zeros(q.shape, dtype=bias.dtype, device=q.device)
        return empty, empty.new_full(q.shape[:2], float("-inf"))
    k, v, bias = (_gather(t, runs) for t in (k, v, bias))
    keep = torch.ones(1, bias.shape[1], dtype=torch.bool, device=q.device)
    return _attend(q, k, v, bias[:, None], keep, scale)


def _gather(tensor: Tensor, runs: Runs) -> Tensor:
    parts = [tensor[:, start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
