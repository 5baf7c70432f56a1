"""block_attention as one operator of torch, so that torch.compile sees one node and breaks no graph.

Only compiled code calls it: in eager mode the wrapper would cost 50 to 100 us a call. It takes the plan as
tensors and numbers, since an operator takes no objects, and writes into buffers that the caller gives.
"""

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.plan import TENSORS, BlockPlan, Kind
from dit_accel_kernels.dispatch import select


@torch.library.custom_op("dit_accel::block_attention", mutates_args=("out", "lse", "cached", "cached_lse"))
def block_attention_op(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],  # BlockPlan.tensors()
    kinds: list[int],
    numbers: list[int],  # block, pairs, query tokens, key tokens
    scale: float,
    cached: Tensor | None,
    cached_lse: Tensor | None,
    key_bias: Tensor | None,
    valid_keys: Tensor | None,
    backend: str,
) -> None:
    """Fills `out`, `lse` and the slots of emitting heads. Raises BackendUnavailable like `select`."""
    block, pairs, *tokens = numbers
    whole = BlockPlan(
        block,
        kinds=tuple(Kind(kind) for kind in kinds),
        pairs=pairs,
        tokens=(tokens[0], tokens[1]),
        **dict(zip(TENSORS, plan, strict=True)),
    )
    tensors = {"q": q, "k": k, "v": v, "plan": whole, "key_bias": key_bias, "out": out}
    run = select("block_attention", backend, **tensors, cached=cached, cached_lse=cached_lse)
    run(out, lse, q, k, v, whole, scale, cached, cached_lse, key_bias, valid_keys)


@block_attention_op.register_fake
def _(out, lse, q, k, v, plan, kinds, numbers, scale, cached, cached_lse, key_bias, valid_keys, backend):
    """Nothing is returned, so nothing has a shape to be told."""


def numbers_of(plan: BlockPlan) -> tuple[list[Tensor], list[int], list[int]]:
    """A plan as the operator takes it: tensors, kinds, numbers."""
    return plan.tensors(), [kind.value for kind in plan.kinds], [plan.block, plan.pairs, *plan.tokens]
