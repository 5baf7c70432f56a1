"""block_attention: attention over lists of key blocks, with heads of different kinds in one call.

For a query in block i of head h, over the keys j of the blocks in its list:

    s_j = scale q . k_j + bias_j          keys at or beyond the sample's `valid_keys` are not seen
    lse = log sum_j exp(s_j)              natural log
    out = sum_j exp(s_j - lse) v_j

What becomes of `out` is the head's `Kind`: written as it is, a cached residual added, a cached tail merged
(`merge`), or only copied from the cache. A full pass can leave the residual or the tail behind without
attending anything twice. A query that sees no key has lse = -inf and out = 0.
Heads of kind COPY and SKIP have lse = -inf: this call knows nothing about them.

Sources: kinds as in DiTFastAttn (arXiv:2406.08552) and DiTFastAttnV2 (arXiv:2503.22796); tail merge as in the
partial softmax of flash attention (arXiv:2205.14135, section 3.1); key coresets carry log(count)
in `key_bias`.
No backward: it is an op for inference.
"""

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.merge import merge
from dit_accel_kernels.block_attention.op import block_attention_op, numbers_of, run
from dit_accel_kernels.block_attention.plan import CACHED_LSE, BlockPlan, Kind, plan_blocks, starts_of

__all__ = ["BlockPlan", "Kind", "block_attention", "merge", "plan_blocks", "starts_of"]

HEAD_WIDTHS = (32, 64, 72, 96, 128)  # what fast backends are made and tested for


def block_attention(
    q: Tensor,  # [B, Nq, H, D], any strides with D contiguous
    k: Tensor,  # [B or 1, Nk, H, D]
    v: Tensor,  # [B or 1, Nk, H, D]
    plan: BlockPlan,
    *,
    scale: float | None = None,  # 1 / sqrt(D) when None
    cached: Tensor | None = None,  # [B, Nq, plan.num_cached, D], read or written as the kinds say
    cached_lse: Tensor | None = None,  # [B, Nq, plan.num_cached] float32, for tails
    key_bias: Tensor | None = None,  # [B or 1, H or 1, Nk] float32, added to the scores
    valid_keys: Tensor | None = None,  # [B] int32: a sample's own number of keys
    out: Tensor | None = None,  # [B, Nq, H, D] to write into; heads of kind SKIP need it
    backend: str = "auto",
    lse_wanted: bool = True,  # without it more backends can serve, and what is returned as lse means nothing
) -> tuple[
    Tensor, Tensor
]:  # out [B, Nq, H, D] in the dtype of q; lse [B, Nq, H] in float32 (float64 for float64)
    """Block-sparse attention of mixed heads and its natural-log LSE.

    Raises ValueError for shapes that do not fit, naming them; BackendUnavailable as `dispatch.select` does.
    """
    _check(q, k, v, plan, cached, cached_lse, key_bias, valid_keys, out)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=lse_dtype, device=q.device)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():  # the operator chooses the backend when it runs
        rest = factor, cached, cached_lse, key_bias, valid_keys, backend, lse_wanted
        block_attention_op(out, lse, q, k, v, *numbers_of(plan), *rest)
        return out, lse
    run(out, lse, q, k, v, plan, factor, cached, cached_lse, key_bias, valid_keys, backend, lse_wanted)
    return out, lse


def _check(q, k, v, plan, cached, cached_lse, key_bias, valid_keys, out) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[2:] == k.shape[2:]
    if not fits or k.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            "block_attention: q must be [B, Nq, H, D], k and v both [B or 1, Nk, H, D]; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    B, Nq, H, D = q.shape
    tokens = (*plan.tokens, plan.num_heads)
    if (Nq, k.shape[1], H) != tokens:
        raise ValueError(
            f"block_attention: the plan is for {tokens[0]} queries, {tokens[1]} keys and {tokens[2]} heads; "
            f"got {Nq}, {k.shape[1]} and {H}"
        )
    places = (B, Nq, plan.num_cached)
    needs_lse = any(kind in CACHED_LSE for kind in plan.kinds)
    _check_shape("cached", cached, [(*places, D)], plan.num_cached > 0)
    _check_shape("cached_lse", cached_lse, [places], needs_lse)
    _check_shape("key_bias", key_bias, [(b, h, k.shape[1]) for b in (1, B) for h in (1, H)], False)
    _check_shape("valid_keys", valid_keys, [(B,)], False)
    _check_shape("out", out, [(B, Nq, H, D)], Kind.SKIP in plan.kinds)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("block_attention has no backward: call it under torch.no_grad()")


def _check_shape(name: str, tensor: Tensor | None, shapes: list[tuple[int, ...]], needed: bool) -> None:
    if tensor is None and not needed:
        return
    if tensor is None or tuple(tensor.shape) not in shapes:
        found = "none" if tensor is None else list(tensor.shape)
        raise ValueError(
            f"block_attention: {name} must be {' or '.join(str(list(s)) for s in shapes)}; got {found}"
        )
