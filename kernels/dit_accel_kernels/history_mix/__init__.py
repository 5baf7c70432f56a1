"""history_mix: a block's input plus a weighted sum of its former outputs, in one pass and rounded once.

    out = x + gate * sum_j w_j y_j

Reuse of the last output is w = (1,); a forecast is a polynomial through the last outputs, (1 + a, -a) for
two; `y` may be a sublayer's output, with the gate of this step, or what a span of blocks added, without.
Weights are numbers of the host, so nothing waits for a device. An entry with weight 0 is not read: NaN or
infinity in it do no harm. Weights (1,) without x and gate copy: the result is bit-equal to y.

Sums are float32 whatever the storage (float64 where a tensor is). A y stored as float8_e4m3fn counts as
float8 * scale of its row: `quantize_rows_fp8` makes both.

Sources: reuse as in FORA (arXiv:2407.01425), forecasts as in TaylorSeer (arXiv:2503.06923); both are
settings of least-squares weights.
No backward: it is an op for inference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel_kernels.history_mix.checks import check_memory, check_tensors, dtype_of
from dit_accel_kernels.history_mix.fp8 import quantize_rows_fp8
from dit_accel_kernels.history_mix.op import history_mix_op, run

__all__ = ["history_mix", "quantize_rows_fp8"]


def history_mix(
    ys: Sequence[Tensor],  # 1 to 8 of one shape [..., N, D], storage of any kind each
    weights: Sequence[float],  # one for each y
    x: Tensor | None = None,  # [..., N, D]; 0 when None
    gate: Tensor | None = None,  # [..., D], broadcasts to x in all axes but the last; 1 when None
    scales: Sequence[Tensor | None] | None = None,  # [..., N, 1] float32 for each float8 y, None for others
    out: Tensor | None = None,  # [..., N, D] to write into; may be x itself, but no part of another operand
    dtype: torch.dtype | None = None,  # when None, that of out, x, or the first y that is not float8
    backend: str = "auto",
) -> Tensor:  # out [..., N, D]
    """The sum of x and the gated mix of ys.

    Raises ValueError for what does not fit together, naming it; BackendUnavailable as `dispatch.select` does.
    """
    scales = [None] * len(ys) if scales is None else scales
    check_tensors(ys, weights, x, gate, scales, out)
    kind = dtype_of(ys, x, out, dtype)
    compiling = torch.compiler.is_compiling()  # what has no address yet is checked when it runs
    if out is None:
        out = torch.empty(ys[0].shape, dtype=kind, device=ys[0].device)
    elif not compiling:
        check_memory(out, ys, x, gate, scales)
    arguments = out, list(ys), list(weights), x, gate, list(scales), backend
    (history_mix_op if compiling else run)(*arguments)
    return out
