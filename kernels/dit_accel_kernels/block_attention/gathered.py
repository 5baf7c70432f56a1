"""block_attention by SDPA over gathered blocks: where there is no compiler for `cpu`.

Each query block attends only the keys of its list, a slice where they are consecutive, so that the work
falls with the density; `reference` does the work of dense attention whatever the lists are. Heads that share
a pattern go together. The kernel is the one behind `F.scaled_dot_product_attention` on a CPU, called by its
own name since only that gives the LSE.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.parts import bias_of, finish
from dit_accel_kernels.block_attention.plan import EMITS, WITHOUT_LIST, BlockPlan, Kind

Runs = list[tuple[int, int]]  # (start, end) of consecutive keys
SDPA = "_scaled_dot_product_flash_attention_for_cpu"


def why_not(q: Tensor, plan: BlockPlan, **others: Any) -> str | None:
    """The reason why this backend cannot take these tensors, or None: lists are read on the host."""
    if q.device.type != "cpu" or plan.indices.device.type != "cpu":
        return f"q is on {q.device.type} and the plan on {plan.indices.device.type}, not on a CPU"
    if not hasattr(torch.ops.aten, SDPA):
        return f"this torch has no aten::{SDPA}"
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
    for head, kind in enumerate(plan.kinds):
        if kind is Kind.COPY:
            assert cached is not None  # checked by the op
            out[:, :, head] = cached[:, :, int(plan.slot[head])].to(out.dtype)
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    bias = None
    if key_bias is not None or valid_keys is not None:
        bias = bias_of(q, k, key_bias, valid_keys)  # [B, H or 1, Nk]
        # an unseen key may hold anything, and 0 * NaN is NaN
        hidden = (bias == float("-inf")).all(dim=1)[..., None, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    slots = plan.slot.tolist()
    # in 16 bits the kernel's exp is coarse, its LSE 1e-5 off, and it is no faster
    dtype = torch.promote_types(q.dtype, torch.float32)
    for heads, kind, rows in _groups(plan):
        own_q, own_k, own_v = (_heads(x, heads).to(dtype).transpose(1, 2) for x in (q, k, v))
        own_bias = None if bias is None else (bias if bias.shape[1] == 1 else bias[:, heads])
        for part, lists in rows:
            attended = [
                _attend(own_q[:, :, part], own_k, own_v, own_bias, runs, scale) for runs in lists
            ]  # [B, h, rows, D] and [B, h, rows]
            for place, head in enumerate(heads):
                kept = None if cached is None else cached[:, part, slots[head]]
                kept_lse = None if cached_lse is None else cached_lse[:, part, slots[head]]
                mine = [(result[:, place], row_lse[:, place]) for result, row_lse in attended]
                result, row_lse = finish(kind, mine, kept, kept_lse)
                out[:, part, head] = result.to(out.dtype)
                lse[:, part, head] = row_lse.to(lse.dtype)


def _groups(plan: BlockPlan) -> Iterator[tuple[list[int], Kind, list[tuple[slice, list[Runs]]]]]:
    """Heads of one pattern and kind, and for each of its query blocks the tokens and the lists to attend."""
    together: dict[tuple[int, Kind], list[int]] = defaultdict(list)
    for head, (kind, number) in enumerate(zip(plan.kinds, plan.pattern.tolist(), strict=True)):
        if kind not in WITHOUT_LIST:
            together[number, kind].append(head)
    starts, lists = plan.q_starts.tolist(), runs_of(plan)
    blocks = len(starts) - 1
    for (number, kind), heads in together.items():
        rows = [
            (slice(starts[row], starts[row + 1]), [*lists[number * blocks + row][: 1 + (kind in EMITS)]])
            for row in range(blocks)
        ]
        yield heads, kind, rows


def _heads(tensor: Tensor, heads: list[int]) -> Tensor:
    """These heads of [B, N, H, D]; a view where they are all."""
    return tensor if len(heads) == tensor.shape[2] else tensor[:, :, heads]


def runs_of(plan: BlockPlan) -> list[tuple[Runs, Runs]]:
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


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, runs: Runs, scale: float
) -> tuple[Tensor, Tensor]:
    """Out [B, h, rows, D], lse [B, h, rows] of q [B, h, rows, D] over some runs of k, v [B, h, Nk, D]."""
    if not runs:
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), dtype=torch.float32)
    k, v = _gather(k, runs), _gather(v, runs)
    sdpa = getattr(torch.ops.aten, SDPA)
    if bias is None:
        return sdpa(q, k, v, scale=scale)
    bias = _gather(bias, runs)[:, :, None]  # [B, h or 1, 1, keys]
    out, lse = sdpa(q, k, v, scale=scale, attn_mask=bias.expand(-1, -1, q.shape[2], -1).to(q.dtype))
    nothing = (bias == float("-inf")).all(dim=3)  # [B, h or 1, 1]; SDPA knows no query that sees no key
    return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, float("-inf"))


def _gather(tensor: Tensor, runs: Runs) -> Tensor:
    parts = [tensor[:, :, start:end] for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
