"""What history_mix refuses, and in which words."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 8  # entries of a history
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT8 = torch.float8_e4m3fn


def check_tensors(
    ys: Sequence[Tensor], weights: Sequence[float], x: Tensor | None, gate: Tensor | None,
    scales: Sequence[Tensor | None], out: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError where counts, shapes, dtypes or devices do not fit together."""
    if not 1 <= len(ys) <= MOST:
        raise ValueError(f"history_mix: it mixes 1 to {MOST} ys; got {len(ys)}")
    if not len(weights) == len(scales) == len(ys):
        raise ValueError(
            f"history_mix: each of {len(ys)} ys needs a weight, and an entry in scales if these are given; "
            f"got {len(weights)} weights and {len(scales)} scales"
        )
    shape = ys[0].shape
    if not shape:
        raise ValueError("history_mix: ys must be [..., N, D]; got a number without axes")
    named = {f"ys[{j}]": y for j, y in enumerate(ys)} | {"x": x, "gate": gate, "out": out}
    for name, tensor in named.items():
        if tensor is not None:
            _check_one(name, tensor, shape, ys[0])
    for j, (y, scale) in enumerate(zip(ys, scales, strict=True)):
        _check_scale(j, y, scale)


def _check_one(name: str, tensor: Tensor, shape: torch.Size, first: Tensor) -> None:
    if name == "gate":
        own = tuple(tensor.shape)
        fits = 1 <= len(own) <= len(shape) and own[-1] == shape[-1]
        rest = zip(own[-2::-1], shape[-2::-1], strict=False)
        if not fits or any(n not in (1, whole) for n, whole in rest):
            raise ValueError(
                f"history_mix: gate must end in {shape[-1]} and broadcast to ys {list(shape)}; "
                f"got {list(own)}"
            )
    elif tensor.shape != shape:
        raise ValueError(
            f"history_mix: {name} must have the shape of ys[0], {list(shape)}; got {list(tensor.shape)}"
        )
    allowed = (*FLOATS, FLOAT8) if name.startswith("ys") else FLOATS
    if tensor.dtype not in allowed:
        raise ValueError(f"history_mix: {name} must be {_names(allowed)}; got {_names([tensor.dtype])}")
    if tensor.device != first.device:
        raise ValueError(
            f"history_mix: all tensors must be on one device; ys[0] is on {first.device}, {name} on "
            f"{tensor.device}"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError("history_mix has no backward: call it under torch.no_grad()")


def _check_scale(j: int, y: Tensor, scale: Tensor | None) -> None:
    if y.dtype != FLOAT8:
        if scale is not None:
            raise ValueError(f"history_mix: scales[{j}] must be None, for ys[{j}] is {_names([y.dtype])}")
        return
    wanted = (*y.shape[:-1], 1)
    if scale is None or tuple(scale.shape) != wanted or scale.dtype != torch.float32:
        found = "None" if scale is None else f"{_names([scale.dtype])} {list(scale.shape)}"
        raise ValueError(
            f"history_mix: ys[{j}] is {_names([FLOAT8])} and needs scales[{j}], float32 {list(wanted)}; "
            f"got {found}. quantize_rows_fp8 makes both"
        )
    if scale.device != y.device:
        raise ValueError(
            f"history_mix: all tensors must be on one device; ys[{j}] is on {y.device}, scales[{j}] on "
            f"{scale.device}"
        )


def dtype_of(
    ys: Sequence[Tensor], x: Tensor | None, out: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the result. Raises ValueError where there is none to take, or two."""
    if out is not None and dtype not in (None, out.dtype):
        raise ValueError(
            f"history_mix: dtype {_names([dtype])} was asked for and out is {_names([out.dtype])}: "
            "leave one of them away"
        )
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"history_mix: dtype must be {_names(FLOATS)}; got {_names([dtype])}")
    found = dtype or next((t.dtype for t in (out, x, *ys) if t is not None and t.dtype != FLOAT8), None)
    if found is None:
        raise ValueError(
            f"history_mix: all ys are {_names([FLOAT8])} and there is no x: name a dtype or give out"
        )
    return found


def check_weights(weights: Sequence[float]) -> None:
    """Raises ValueError for one that is not finite."""
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"history_mix: weights must be finite; got {[float(weight) for weight in weights]}")


def check_memory(
    out: Tensor, ys: Sequence[Tensor], x: Tensor | None, gate: Tensor | None, scales: Sequence[Tensor | None]
) -> None:
    """Raises ValueError for an `out` in the memory of what is read, but for x in the very same place."""
    if any(step == 0 and n > 1 for n, step in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"history_mix: out is broadcast, strides {out.stride()}: give it memory for each number"
        )
    start, end = _range(out)
    for tensor in (*ys, *scales, gate, x):
        if tensor is None or (tensor is x and _is_same(out, tensor)):
            continue
        first, last = _range(tensor)  # two that are woven into each other meet too
        if first < end and start < last:
            raise ValueError(
                f"history_mix: out lies in the memory of a tensor {list(tensor.shape)} that is read: "
                "only x itself may be out"
            )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Element for element in one place: each is read before it is written."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride() and one.dtype == other.dtype


def _range(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte and after the last."""
    first = t.data_ptr()
    if t.is_contiguous():
        return first, first + t.nbytes
    last = sum([(n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)])
    return first, first + (last + 1) * t.itemsize


def _names(dtypes: Sequence[torch.dtype | None]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
