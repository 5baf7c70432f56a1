"""history_mix as one operator of torch, so that torch.compile sees one node and breaks no graph.

Only compiled code calls it: in eager mode the wrapper would cost as much as a small call.
"""

import torch
from torch import Tensor

from dit_accel_kernels.dispatch import is_free, select
from dit_accel_kernels.history_mix import plain
from dit_accel_kernels.history_mix.checks import check_memory, check_weights


@torch.library.custom_op("dit_accel::history_mix", mutates_args=("out",))
def history_mix_op(
    out: Tensor,
    ys: list[Tensor],
    weights: list[float],
    x: Tensor | None,
    gate: Tensor | None,
    scales: list[Tensor | None],
    backend: str,
) -> None:
    """Fills `out`. Raises BackendUnavailable like `select`, and ValueError as the checks."""
    check_memory(out, ys, x, gate, scales)
    run(out, ys, weights, x, gate, scales, backend)


@history_mix_op.register_fake
def _(out, ys, weights, x, gate, scales, backend):
    """Nothing is returned, so nothing has a shape to be told."""


def run(
    out: Tensor, ys: list[Tensor], weights: list[float], x: Tensor | None, gate: Tensor | None,
    scales: list[Tensor | None], backend: str,
) -> None:  # fmt: skip
    """Let the chosen backend fill `out` from the entries that have a weight. Raises as the operator does."""
    check_weights(weights)
    used = [j for j, weight in enumerate(weights) if weight]
    ys, scales = [ys[j] for j in used], [scales[j] for j in used]
    weights = [weights[j] for j in used]
    if not out.numel():
        return
    if not ys:
        out.zero_() if x is None else out.copy_(x)
    elif weights == [1] and x is gate is scales[0] is None and ys[0].dtype == out.dtype:
        out.copy_(ys[0])
    elif is_free(backend) and plain.is_faster(out, ys, x, gate):
        plain.mix(out, ys, weights, x, gate)
    else:
        tensors = {"out": out, "ys": ys, "x": x, "gate": gate, "scales": scales}
        select("history_mix", backend, **tensors)(out, ys, weights, x, gate, scales)
