"""block_attention as one operator of torch, so that torch.compile sees one node and breaks no graph.

Only compiled code calls it: in eager mode the wrapper would cost 50 to 100 us a call. It takes the plan as
tensors and numbers, since an operator takes no objects, and writes into buffers that the caller gives.
"""

import torch
from torch import Tensor

from dit_accel_kernels.block_attention import dense
from dit_accel_kernels.block_attention.plan import TENSORS, BlockPlan, Kind
from dit_accel_kernels.dispatch import BackendUnavailable, select


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
    lse_wanted: bool,
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
    run(out, lse, q, k, v, whole, scale, cached, cached_lse, key_bias, valid_keys, backend, lse_wanted)


@block_attention_op.register_fake
def _(
    out, lse, q, k, v, plan, kinds, numbers, scale, cached, cached_lse, key_bias, valid_keys, backend,
    lse_wanted,
):  # fmt: skip
    """Nothing is returned, so nothing has a shape to be told."""


def numbers_of(plan: BlockPlan) -> tuple[list[Tensor], list[int], list[int]]:
    """A plan as the operator takes it: tensors, kinds, numbers."""
    return plan.tensors(), [kind.value for kind in plan.kinds], [plan.block, plan.pairs, *plan.tokens]


def run(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float,
    cached: Tensor | None, cached_lse: Tensor | None, key_bias: Tensor | None, valid_keys: Tensor | None,
    backend: str, lse_wanted: bool,
) -> None:  # fmt: skip
    """Let the chosen backend fill the buffers. Raises BackendUnavailable like `select`."""
    tensors = {"q": q, "k": k, "v": v, "plan": plan, "key_bias": key_bias, "out": out}
    tensors |= {"cached": cached, "cached_lse": cached_lse}
    arguments = out, lse, q, k, v, plan, scale, cached, cached_lse, key_bias, valid_keys
    if backend == "auto" and dense.is_faster(q, k, v, plan, key_bias, valid_keys, lse_wanted):
        dense.attend(out, lse, q, k, v, scale)
        return
    chosen = select("block_attention", backend, **tensors, lse_wanted=lse_wanted)
    try:
        chosen(*arguments)
    except BackendUnavailable:  # it could not be compiled, and its why_not knows that from now on
        if backend != "auto":
            raise
        select("block_attention", backend, **tensors, lse_wanted=lse_wanted)(*arguments)
