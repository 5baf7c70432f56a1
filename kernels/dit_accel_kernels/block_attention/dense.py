"""Dense attention on a CPU where a plan asks for nothing else and `auto` is free to take it."""

import torch
from torch import Tensor

from dit_accel_kernels.block_attention import break_even
from dit_accel_kernels.block_attention.gathered import SDPA
from dit_accel_kernels.block_attention.plan import BlockPlan, Kind


def is_faster(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, key_bias: Tensor | None, valid_keys: Tensor | None,
    lse_wanted: bool,
) -> bool:  # fmt: skip
    """Whether every head attends every block, nothing is masked, and the best backend is slower than SDPA."""
    if plan.density < 1 or key_bias is not None or valid_keys is not None or q.device.type != "cpu":
        return False
    if any(kind is not Kind.ATTEND for kind in plan.kinds) or not hasattr(torch.ops.aten, SDPA):
        return False
    if lse_wanted and q.dtype in (torch.float16, torch.bfloat16):
        return False  # SDPA's own LSE is 1e-5 off there
    return break_even.slower_than_dense(q, k, v, plan) is not None


def attend(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """Fills `out` [B, N, H, D] and `lse` [B, N, H]."""
    k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
    sdpa = getattr(torch.ops.aten, SDPA)
    result, row_lse = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    out.copy_(result.transpose(1, 2))
    lse.copy_(row_lse.transpose(1, 2))
