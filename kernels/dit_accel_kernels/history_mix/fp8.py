"""Rows of floats as float8_e4m3fn with one scale each: a quarter of float32, half of bfloat16.

    scale = max |x| of the row / 448        448 is the largest float8_e4m3fn
    value = float8(x / scale)               to nearest

The error is at most 2^-4 of x, and 2^-10 scale where |x| is below 2^-6 scale. A row of zeros has a scale too,
the smallest that is safe to divide by. A row with NaN or infinity reads back as NaN.
"""

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # numbers whose float32 copies exist at one time


@torch.no_grad()
def quantize_rows_fp8(
    x: Tensor,  # [..., N, D] float32, bfloat16 or float16
) -> tuple[Tensor, Tensor]:  # float8_e4m3fn [..., N, D]; float32 [..., N, 1]
    """Rows in float8 and their scales, contiguous. Raises ValueError for what has no rows of floats."""
    if x.ndim < 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "quantize_rows_fp8: x must be float32, bfloat16 or float16 [..., N, D]; "
            f"got {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
        )
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if not x.numel():
        return values, scales
    D = x.shape[-1]
    parts = (t.reshape(-1, t.shape[-1]).split(max(1, AT_ONCE // D)) for t in (x, values, scales))
    for row, value, scale in zip(*parts, strict=True):
        part = row.float()
        torch.amax(part.abs(), dim=-1, keepdim=True, out=scale)
        scale.div_(torch.finfo(torch.float8_e4m3fn).max).clamp_(min=torch.finfo(torch.float32).tiny)
        value.copy_(part / scale)
    return values, scales
