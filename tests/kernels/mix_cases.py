"""Calls of history_mix that every backend must answer: shapes, storages, strides and what is left out."""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.testing import far_from_zero
from dit_accel_kernels.history_mix import history_mix, quantize_rows_fp8

WEIGHTS = (1.75, -0.5, 0.25, -1.0, 3.0, 0.5, -2.0, 1.5)


@dataclass(frozen=True)
class Case:
    """One call; `storage` has an entry for each y, "" for the call's own dtype."""

    shape: tuple[int, ...]
    storage: tuple[str, ...] = ("", "")
    x: bool = True
    gate: tuple[int, ...] | None = None  # its shape
    gate_dtype: str = ""
    strided: bool = False  # every second row of wider tensors


CASES = {
    "one_number": Case((1, 1, 1), gate=(1, 1, 1)),
    "one_token": Case((2, 1, 64), gate=(2, 1, 64)),
    "odd": Case((2, 17, 7), ("", "", ""), gate=(2, 1, 7)),
    "one_channel": Case((1, 1000, 1), gate=(1, 1000, 1)),
    "wide": Case((2, 17, 257), gate=(257,)),
    "wider_than_a_piece": Case((3, 2100), gate=(3, 2100)),
    "long": Case((1, 1000, 64), gate=(1, 1, 64)),
    "one_axis": Case((257,), gate=(257,)),
    "no_gate": Case((2, 17, 64)),
    "no_x": Case((2, 17, 64), gate=(2, 17, 64), x=False),
    "alone": Case((2, 17, 64), ("",), x=False),
    "reuse": Case((2, 17, 64), ("",)),
    "gated_reuse": Case((2, 17, 64), ("",), gate=(2, 1, 64)),
    "eight": Case((2, 17, 64), ("",) * 8, gate=(2, 17, 64)),
    "strided": Case((2, 17, 64), ("", "float8_e4m3fn"), gate=(2, 17, 64), strided=True),
    "four_axes": Case((2, 3, 5, 7), gate=(1, 3, 1, 7), strided=True),
    "mixed": Case((2, 17, 64), ("float32", "float16", "bfloat16"), gate=(2, 1, 64), gate_dtype="float32"),
    "float8": Case((2, 17, 257), ("float8_e4m3fn",) * 2, gate=(2, 1, 257)),
    "float8_alone": Case((2, 17, 7), ("float8_e4m3fn", ""), x=False),
}


@dataclass
class Call:
    """The arguments of history_mix."""

    ys: list[Tensor]
    weights: Sequence[float]
    x: Tensor | None
    gate: Tensor | None
    scales: list[Tensor | None]
    out: Tensor


def make(case: Case, dtype: torch.dtype) -> Call:
    """Numbers around 1, from a fixed seed; out is NaN."""
    pairs = [_stored(case, name, dtype, seed) for seed, name in enumerate(case.storage)]
    gate_dtype = getattr(torch, case.gate_dtype) if case.gate_dtype else dtype
    return Call(
        [y for y, _ in pairs],
        WEIGHTS[: len(pairs)],
        _spread(far_from_zero(*case.shape, dtype=dtype, seed=20), case) if case.x else None,
        None if case.gate is None else far_from_zero(*case.gate, dtype=gate_dtype, seed=21),
        [scale for _, scale in pairs],
        _spread(torch.full(case.shape, float("nan"), dtype=dtype), case),
    )


def _stored(case: Case, name: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor | None]:
    y = far_from_zero(*case.shape, dtype=torch.float32 if name.startswith("float8") else dtype, seed=seed)
    if name.startswith("float8"):
        values, scale = quantize_rows_fp8(y)
        return _spread(values, case), _spread(scale, case)
    return _spread(y.to(getattr(torch, name)) if name else y, case), None


def _spread(tensor: Tensor, case: Case) -> Tensor:
    """The same numbers with gaps between rows."""
    if not case.strided:
        return tensor
    shape = list(tensor.shape)
    wide = torch.full((*shape[:-2], 2 * shape[-2], shape[-1] + 3), 77.0).to(tensor.dtype)
    view = wide[..., ::2, 1 : 1 + shape[-1]]
    view.copy_(tensor)
    return view


def by_definition(call: Call) -> Tensor:
    """The equation in float64."""
    return _equation(call, torch.float64)


def by_torch(call: Call) -> Tensor:
    """The equation in PyTorch, in the dtype of out throughout."""
    return _equation(call, call.out.dtype)


def _equation(call: Call, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(call.out.shape, dtype=dtype)
    for y, weight, scale in zip(call.ys, call.weights, call.scales, strict=True):
        total += weight * (y.to(dtype) if scale is None else y.to(dtype) * scale.to(dtype))
    if call.gate is not None:
        total = call.gate.to(dtype) * total
    return total if call.x is None else call.x.to(dtype) + total


def run(call: Call, backend: str, **changes: Any) -> Tensor:
    """What a backend fills `out` with."""
    given = {name: getattr(call, name) for name in ("ys", "weights", "x", "gate", "scales", "out")} | changes
    return history_mix(**given, backend=backend)


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy up to a page that nobody may touch: to read beyond it ends the process."""
    whole = -(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    none = 0  # PROT_NONE
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(mmap.PAGESIZE), none):
        raise OSError("mprotect failed")
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=whole - t.nbytes, count=t.nbytes)
    copy = copy.view(t.dtype).view(t.shape)
    return copy.copy_(t)
