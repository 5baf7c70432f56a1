"""What one launch of block_attention's Hopper kernel is given: tensor maps, arguments and grid, from tensors.

Nothing here needs a device, so tests read the very bytes that a driver would be handed.
"""

import ctypes as c
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention.cuda_builds import BLOCK
from dit_accel_kernels.block_attention.plan import TENSORS, BlockPlan
from dit_accel_kernels.cuda_driver import BFLOAT16, FLOAT16

TYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
BOX_COLUMNS = 64  # 128 bytes: what one row of the swizzle holds
THREADS = 384  # a producing warpgroup and two that consume

POINTERS = ("out", "lse", "cached", "cached_lse", "key_bias", "valid_keys", *TENSORS, "ticket")
STRIDED = ("out", "lse", "cached", "cached_lse", "bias")


class Arguments(c.Structure):
    """`Arguments` of arguments.h: the same fields in the same order."""

    _fields_ = (
        *((name, c.c_void_p) for name in POINTERS),
        *((f"{name}_stride", c.c_longlong * 3) for name in STRIDED),
        *((name, c.c_int) for name in ("batch", "items", "q_blocks", "kv_batch")),
        ("scale", c.c_float),
        ("padding", c.c_int),
    )


@dataclass(frozen=True)
class Launch:
    """All that a launch needs but the kernel and the stream."""

    maps: tuple[tuple[Any, ...], ...]  # of q, k and v: what Driver.tensor_map takes
    arguments: Arguments
    grid: int  # thread blocks; each takes items until there are none
    kept: tuple[Tensor | None, ...]  # memory that must live until the launch is queued


def prepare(
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
    multiprocessors: int,
) -> Launch:
    """The launch of one call whose tensors `cuda.why_not` has passed; the plan has work."""
    batch, _, heads, _ = q.shape
    if key_bias is not None:
        key_bias = key_bias.to(q.device, torch.float32).expand(batch, heads, -1)
    if valid_keys is not None:
        valid_keys = valid_keys.to(q.device, torch.int32).contiguous()
    ticket = torch.zeros(1, dtype=torch.int32, device=q.device)
    given = {"out": out, "lse": lse, "cached": cached, "cached_lse": cached_lse}
    tensors = {**given, "key_bias": key_bias, "valid_keys": valid_keys, "ticket": ticket}
    tensors |= {name: getattr(plan, name) for name in TENSORS}
    arguments = Arguments(scale=scale, batch=batch, items=len(plan.work), q_blocks=len(plan.q_starts) - 1)
    arguments.kv_batch = samples(k)
    for name, tensor in tensors.items():
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())
    for name, tensor in (given | {"bias": key_bias}).items():
        if tensor is not None:
            setattr(arguments, f"{name}_stride", (c.c_longlong * 3)(*tensor.stride()[:3]))
    one_for_all = arguments.kv_batch == 1
    maps = tensor_map(q, False), tensor_map(k, one_for_all), tensor_map(v, one_for_all)
    grid = min(multiprocessors, batch * len(plan.work))
    return Launch(maps, arguments, grid, (key_bias, valid_keys, ticket))


def samples(t: Tensor) -> int:
    """Samples that differ: one that was expanded is one."""
    return 1 if t.stride(0) == 0 else t.shape[0]


def tensor_map(t: Tensor, one_for_all: bool) -> tuple[Any, ...]:
    """dtype, address, sizes, strides in bytes and box of a tensor [B, N, H, D], innermost first."""
    batch, tokens, heads, width = t.shape
    sizes = (width, tokens, heads, 1 if one_for_all else batch)
    steps = (t.stride(1), t.stride(2), t.stride(0))
    # a step along a size of 1 is never taken, and PyTorch puts anything there
    legal = tuple(step * 2 if n > 1 else width * 2 for step, n in zip(steps, sizes[1:], strict=True))
    return TYPES[t.dtype], t.data_ptr(), sizes, legal, (BOX_COLUMNS, BLOCK, 1, 1)


def why_not_mapped(name: str, t: Tensor) -> str | None:
    """The reason why the tensor memory accelerator cannot read q, k or v, or None."""
    if t.stride(-1) != 1:
        return f"the head width of {name} is not contiguous"
    if t.data_ptr() % 16:
        return f"{name} starts at no multiple of 16 bytes"
    for place, (size, step) in enumerate(zip(t.shape[:3], t.stride()[:3], strict=True)):
        shared = place == 0 and name != "q"  # keys and values of one sample may serve all
        if size > 1 and (step * 2 % 16 or step < 0 or (step == 0 and not shared)):
            what = ("samples", "tokens", "heads")[place]
            return f"{name} has its {what} {step * 2} bytes apart, and steps must be multiples of 16 over 0"
    return None


def why_not_written(name: str, t: Tensor, dtype: torch.dtype) -> str | None:
    """The reason why the kernel cannot write `out` or `cached`, or None: it moves pairs of 16 bits."""
    if t.dtype is not dtype:
        return f"{name} is {str(t.dtype).removeprefix('torch.')} and q {str(dtype).removeprefix('torch.')}"
    if t.stride(-1) != 1:
        return f"the head width of {name} is not contiguous"
    if t.data_ptr() % 4 or any(size > 1 and step % 2 for size, step in zip(t.shape, t.stride()[:3])):  # noqa: B905
        return f"{name} has rows that start at no multiple of 4 bytes"
    return None
