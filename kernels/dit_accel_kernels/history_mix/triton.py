"""history_mix in Triton, in one launch: for CUDA devices from sm_80 on; in the interpreter, to test it."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from dit_accel_kernels.history_mix.layout import AXES, rows_of
from dit_accel_kernels.history_mix.triton_kernel import mix_rows

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 2048  # numbers of a program: two 16-byte loads of 16-bit numbers for each of its 128 threads
WIDEST = 512  # columns of a tile
WARPS = 4
NOWHERE = (0,) * AXES  # the strides of what is left out
# what @triton.jit made, not what the environment says now: the flag is read when the kernel is imported
INTERPRETED = not isinstance(mix_rows, triton.JITFunction)


def why_not(
    *,
    out: Tensor,
    ys: Sequence[Tensor],
    x: Tensor | None,
    gate: Tensor | None,
    scales: Sequence[Tensor | None],
    **_: Any,
) -> str | None:
    """The reason why these tensors cannot go through Triton here, or None."""
    given = [t for t in (out, x, gate, *ys) if t is not None]
    if any(t.dtype not in (*FLOATS, torch.float8_e4m3fn) for t in given):
        return f"it takes {_names(FLOATS)}; got {_names(t.dtype for t in given)}"
    rows = rows_of(given, scales)
    if isinstance(rows, str):
        return rows
    if INTERPRETED:
        wrong = out.dtype == torch.bfloat16  # which it can load: sums are float32
        return "Triton's interpreter rounds to bfloat16 by cutting off" if wrong else None
    if not out.is_cuda:
        return f"it needs a CUDA device, or TRITON_INTERPRET=1 before its import; out is on {out.device}"
    if torch.version.hip:
        return "its tiles are chosen for NVIDIA devices only"
    major, minor = torch.cuda.get_device_capability(out.device)
    return f"it needs sm_80 or later; this is sm_{major}{minor}" if major < 8 else None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def history_mix(
    out: Tensor,
    ys: Sequence[Tensor],
    weights: Sequence[float],
    x: Tensor | None,
    gate: Tensor | None,
    scales: Sequence[Tensor | None],
) -> None:
    """Fills `out`."""
    rows = rows_of([t for t in (out, x, gate, *ys) if t is not None], scales)
    assert not isinstance(rows, str), rows
    strides = iter(rows.strides)
    out_steps = next(strides)
    x_steps, gate_steps = (NOWHERE if t is None else next(strides) for t in (x, gate))
    y_steps = tuple(next(strides) for _ in ys)
    scale_steps = tuple(NOWHERE if scale is None else next(strides) for scale in scales)
    stored = tuple(y.view(torch.uint8) if y.dtype == torch.float8_e4m3fn else y for y in ys)
    number = rows.size[0] * rows.size[1] * rows.size[2]
    tile = tile_of(rows.width)
    tiles = triton.cdiv(number, tile["ROWS"]) * triton.cdiv(rows.width, tile["COLUMNS"])
    with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
        mix_rows[(tiles,)](
            *(out, x, gate, stored, tuple(scales), tuple(map(float, weights))),
            *(out_steps, x_steps, gate_steps, y_steps, scale_steps),
            *(number, rows.size[1], rows.size[2], rows.width),
            COUNT=len(ys),
            **tile,
            num_warps=WARPS,
            enable_fp_fusion=True,  # Triton 3.10 turns it off unless asked
        )


def tile_of(width: int) -> dict[str, int]:
    """Rows and columns of a tile, powers of 2."""
    columns = min(WIDEST, triton.next_power_of_2(width))
    return {"ROWS": TILE // columns, "COLUMNS": columns}
