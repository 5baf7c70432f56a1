"""history_mix on a CPU, in C (`cpu.c`), built at first use; `build.py` says how and where.

The interpreter's lock is released during a call. Threads: `torch.get_num_threads()`, fewer for little
work; they are those of PyTorch's own OpenMP team where the process has one.
"""

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.history_mix.layout import AXES, rows_of

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float8_e4m3fn: 3}
MOST = 8  # entries of a history
OF_A_THREAD = 32768  # numbers of `out` below which a thread is not worth its start


class Operand(ctypes.Structure):
    """`Operand` of cpu.c: the same fields in the same order."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * AXES), ("type", ctypes.c_int64))


class Call(ctypes.Structure):
    """`Call` of cpu.c: the same fields in the same order."""

    _fields_ = (
        *((name, Operand) for name in ("out", "x", "gate")),
        *((name, Operand * MOST) for name in ("y", "scale")),
        ("size", ctypes.c_int64 * AXES),
        *((name, ctypes.c_int64) for name in ("width", "count", "threads")),
        ("weight", ctypes.c_float * MOST),
    )


def why_not(
    *,
    out: Tensor,
    ys: Sequence[Tensor],
    x: Tensor | None,
    gate: Tensor | None,
    scales: Sequence[Tensor | None],
    **_: Any,
) -> str | None:
    """The reason why this backend cannot take these tensors, or None. The first call builds the library."""
    if out.device.type != "cpu":
        return f"the tensors are on {out.device.type}"
    given = [t for t in (out, x, gate, *ys) if t is not None]
    if not all(t.dtype in TYPES for t in given):
        return f"it takes {_names(TYPES)}; got {_names([t.dtype for t in given])}"
    rows = rows_of(given, scales)
    if isinstance(rows, str):
        return rows
    try:
        load(build.chosen_level())
    except build.BuildError as error:
        return str(error)
    return None


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def load(level: str) -> ctypes.CDLL:
    """The library of a level of build.LEVELS. Raises build.BuildError."""
    library = _load_once(level)
    if isinstance(library, str):
        raise build.BuildError(library)
    return library


@functools.cache
def _load_once(level: str) -> ctypes.CDLL | str:
    """The library, or why there is none: a build that failed is not tried again at every call."""
    try:
        library = ctypes.CDLL(str(build.library(Path(__file__).with_suffix(".c"), level)))
    except (build.BuildError, OSError) as error:
        return str(error)
    library.history_mix.argtypes = [ctypes.POINTER(Call)]
    library.history_mix.restype = None
    return library


def history_mix(
    out: Tensor,
    ys: Sequence[Tensor],
    weights: Sequence[float],
    x: Tensor | None,
    gate: Tensor | None,
    scales: Sequence[Tensor | None],
) -> None:
    """Fills `out`."""
    call = Call(count=len(ys), weight=tuple(weights))
    operands, tensors = [call.out], [out]
    for operand, tensor in ((call.x, x), (call.gate, gate), *zip(call.y, ys, strict=False)):
        if tensor is not None:
            operands.append(operand)
            tensors.append(tensor)
    rows = rows_of(tensors, scales)
    assert not isinstance(rows, str), rows
    for j, scale in enumerate(scales):
        if scale is not None:
            operands.append(call.scale[j])
            tensors.append(scale)
    for operand, tensor, strides in zip(operands, tensors, rows.strides, strict=True):
        operand.data, operand.stride, operand.type = tensor.data_ptr(), strides, TYPES[tensor.dtype]
    call.size, call.width = rows.size, rows.width
    call.threads = max(1, min(torch.get_num_threads(), out.numel() // OF_A_THREAD))
    load(build.chosen_level()).history_mix(ctypes.byref(call))
