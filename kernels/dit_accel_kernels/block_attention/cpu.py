"""block_attention on a CPU, in C (`cpu.c`), built at first use; `build.py` says how and where.

The interpreter's lock is released during a call. Threads: `torch.get_num_threads()`, fewer for little
work; they are those of PyTorch's own OpenMP team where the process has one.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.block_attention.plan import TENSORS, BlockPlan

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OF_A_THREAD = 4_000_000  # floating-point operations below which a thread is not worth its start of 20 us
MOST_KEPT = 1 << 28  # bytes of workspace kept for the next call: fresh pages cost as much as the packing

STRIDED = ("q", "k", "v", "out", "cached", "lse", "cached_lse", "bias")
NUMBERS = ("batch", "packs", "heads", "width", "q_blocks", "k_blocks", "items", "block", "threads")
POINTERS = ("q", "k", "v", "out", "cached", "lse", "cached_lse", "bias", "valid", *TENSORS, "workspace")


class Call(ctypes.Structure):
    """`Call` of cpu.c: the same fields in the same order."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in STRIDED),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_int32) for name in ("type", "out_type", "cached_type")),
        ("scale", ctypes.c_float),
    )


_spare: list[Tensor] = []  # at most one workspace; a call takes it out while it runs


def why_not(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **others: Any) -> str | None:
    """The reason why this backend cannot take these tensors, or None. The first call builds the library."""
    for name, tensor in {"q": q, "k": k, "v": v, "the plan": plan.indices}.items():
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device.type}"
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.dtype not in TYPES or tensor.dtype != q.dtype:
            return (
                f"{name} is {_name(tensor)} and q {_name(q)}: only float32, float16 or bfloat16, one for all"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of {name} is not contiguous"
    if q.shape[-1] % 8:
        return f"head width {q.shape[-1]} is not a multiple of 8"
    try:
        load(build.chosen_level())
    except build.BuildError as error:
        return str(error)
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
    library.block_attention_workspace.argtypes = [ctypes.POINTER(Call)]
    library.block_attention_workspace.restype = ctypes.c_int64
    library.block_attention.argtypes = [ctypes.POINTER(Call)]
    library.block_attention.restype = None
    return library


def block_attention(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    cached: Tensor | None,
    cached_lse: Tensor | None,
    key_bias: Tensor | None,
    valid_keys: Tensor | None,
) -> None:
    """Fills `out` and `lse`, and the slots of emitting heads in `cached` and `cached_lse`."""
    if not plan.work.numel() or not q.numel():
        return
    library = load(build.chosen_level())
    written = {"out": out, "lse": lse, "cached": cached, "cached_lse": cached_lse}
    usable = {name: _usable(name, tensor) for name, tensor in written.items()}
    masks = _masks(q, key_bias, valid_keys)
    tensors = {"q": q, "k": k, "v": v, **usable, **masks, **{n: getattr(plan, n) for n in TENSORS}}
    call = _call(tensors, plan, scale)
    workspace = _workspace(library.block_attention_workspace(ctypes.byref(call)))
    call.workspace = workspace.data_ptr()
    library.block_attention(ctypes.byref(call))
    if workspace.numel() <= MOST_KEPT:
        _spare[:] = [workspace]
    for name, tensor in written.items():
        used = usable[name]
        if tensor is not None and used is not None and used is not tensor:
            tensor.copy_(used)


def _usable(name: str, tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of a type and layout that the library takes."""
    if tensor is None:
        return None
    if name in ("lse", "cached_lse"):
        return tensor.float()
    return tensor if tensor.dtype in TYPES and tensor.stride(-1) == 1 else tensor.float().contiguous()


def _masks(q: Tensor, key_bias: Tensor | None, valid_keys: Tensor | None) -> dict[str, Tensor | None]:
    """`bias` as [B, H, Nk] with strides of any kind, `valid` as contiguous int32 [B]."""
    if key_bias is not None:
        key_bias = key_bias.float().expand(q.shape[0], q.shape[2], -1)
    if valid_keys is not None:
        valid_keys = valid_keys.to("cpu", torch.int32).contiguous()
    return {"bias": key_bias, "valid": valid_keys}


def _call(tensors: dict[str, Tensor | None], plan: BlockPlan, scale: float) -> Call:
    call = Call(scale=scale, block=plan.block, items=len(plan.work))
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    for name in STRIDED:
        tensor = tensors[name]
        if tensor is not None:
            setattr(call, f"{name}_stride", _strides(name, tensor))
    q, k = tensors["q"], tensors["k"]
    assert q is not None and k is not None
    call.batch, _, call.heads, call.width = q.shape
    masked = tensors["bias"] is not None or tensors["valid"] is not None
    call.packs = q.shape[0] if masked or k.shape[0] > 1 else 1  # samples that see other keys are packed apart
    call.q_blocks, call.k_blocks = len(plan.q_starts) - 1, len(plan.k_starts) - 1
    for name in ("q", "out", "cached"):
        tensor = tensors[name]
        setattr(call, "type" if name == "q" else f"{name}_type", 0 if tensor is None else TYPES[tensor.dtype])
    operations = 4 * plan.pairs * plan.block**2 * q.shape[0] * q.shape[-1]
    call.threads = max(1, min(torch.get_num_threads(), operations // OF_A_THREAD))
    return call


def _strides(name: str, tensor: Tensor) -> Any:
    """Of batch, token and head, in elements; 0 along a batch of 1, which serves every sample."""
    batch, token, head = tensor.stride()[:3]
    if name == "bias":
        token, head = head, token
    return (ctypes.c_int64 * 3)(0 if tensor.shape[0] == 1 else batch, token, head)


def _workspace(size: int) -> Tensor:
    try:
        spare = _spare.pop()
    except IndexError:
        spare = None
    if spare is not None and size <= spare.numel():
        return spare
    return torch.empty(size, dtype=torch.uint8)
