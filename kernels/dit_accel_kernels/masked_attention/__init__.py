"""masked_attention: attention in which each query sees the keys that a mask keeps, with its log-sum-exp.

    s_ij = scale q_i . k_j  where the mask keeps (i, j), else -inf
    lse_i = log sum_j exp(s_ij)
    out_i = sum_j exp(s_ij - lse_i) v_j

The natural-log LSE is what two partial attentions need to be merged into one. A query that sees no key has
lse = -inf and out = 0: it weighs nothing in such a merge.

Backends: reference (any device and dtype, float64 included).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel_kernels.dispatch import select
from dit_accel_kernels.masked_attention.masks import BothMasks, Mask, WindowMask, window_mask

__all__ = ["BothMasks", "Mask", "WindowMask", "masked_attention", "window_mask"]


def masked_attention(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B or 1, Nk, H, D]
    v: Tensor,  # [B or 1, Nk, H, D]
    mask: Mask | Sequence[Mask] = None,  # bool, broadcasts to [B, H, Nq, Nk]; or H masks, one per head
    scale: float | None = None,  # 1 / sqrt(D) when None
    backend: str = "auto",
) -> tuple[
    Tensor, Tensor
]:  # out [B, Nq, H, D] in the dtype of q; lse [B, Nq, H] in float32, float64 for float64
    """Masked attention and its natural-log LSE."""
    _check_shapes(q, k, v)
    B, Nq, H, D = q.shape
    if isinstance(mask, Sequence):
        if len(mask) != H:
            raise ValueError(
                f"masked_attention: {len(mask)} masks for {H} heads; give one per head, or one for all"
            )
        for each in mask:
            _check_mask(each, (B, 1, Nq, k.shape[1]))
    else:
        _check_mask(mask, (B, H, Nq, k.shape[1]))
    run = select("masked_attention", backend, q=q, k=k, v=v, mask=mask)
    return run(q, k, v, mask, D**-0.5 if scale is None else scale)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[2:] == k.shape[2:]
    if not fits or k.shape[0] not in (1, q.shape[0]) or k.shape[1] == 0:
        raise ValueError(
            "masked_attention: q must be [B, Nq, H, D], k and v both [B or 1, Nk, H, D] with Nk > 0; "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )


def _check_mask(mask: Mask, full: tuple[int, int, int, int]) -> None:
    if mask is None:
        return
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(
            f"masked_attention: a mask is bool, True where a key is seen; got {mask.dtype}. "
            "An additive bias is not supported: use scaled_dot_product_attention."
        )
    axes = tuple(mask.shape)
    if not 2 <= len(axes) <= 4 or any(m not in (1, n) for m, n in zip(axes[::-1], full[::-1], strict=False)):
        raise ValueError(
            f"masked_attention: a mask must broadcast to [B, H, Nq, Nk] = {list(full)}; got {list(axes)}"
        )
