"""block_attention in Triton: one launch over the plan's work, every kind of head in it.

Runs on CUDA devices from sm_80 on, and with TRITON_INTERPRET=1 on the CPU, to test it. Tile sizes are read
from `triton_configs.json`; nothing is tuned while a pipeline runs. Keys beyond `valid_keys`, and keys with a
`key_bias` of -inf, may hold anything.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_accel_kernels.block_attention import HEAD_WIDTHS
from dit_accel_kernels.block_attention.plan import BlockPlan
from dit_accel_kernels.block_attention.triton_configs import Config, config_for
from dit_accel_kernels.block_attention.triton_kernel import attend_blocks

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# what @triton.jit made, not what the environment says now: the flag is read when the kernel is imported
INTERPRETED = not isinstance(attend_blocks, triton.JITFunction)
LARGEST_BLOCK = 128


def why_not(*, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **_: Any) -> str | None:
    """The reason why these tensors cannot go through Triton here, or None."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return (
            f"it takes q, k and v of one dtype, {_names(DTYPES)}; got {_names((q.dtype, k.dtype, v.dtype))}"
        )
    if q.shape[-1] not in HEAD_WIDTHS:
        return f"head width {q.shape[-1]} is none of {', '.join(map(str, HEAD_WIDTHS))}"
    if plan.block > LARGEST_BLOCK:
        return f"blocks of {plan.block} tokens are over {LARGEST_BLOCK}"
    if any(t.stride(-1) != 1 for t in (q, k, v)):
        return "the head width of q, k or v is not contiguous"
    if len({t.device for t in (q, k, v, plan.work)}) > 1:
        return f"q is on {q.device}, k on {k.device}, v on {v.device}, the plan on {plan.work.device}"
    return _why_not_interpreted(q) if INTERPRETED else _why_not_device(q)


def _why_not_interpreted(q: Tensor) -> str | None:
    if q.dtype is torch.bfloat16:
        return "Triton's interpreter calculates bfloat16 wrongly without a word"
    return None


def _why_not_device(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"it needs a CUDA device, or TRITON_INTERPRET=1 before its import; q is on {q.device}"
    if torch.version.hip:
        return "its tiles are chosen for NVIDIA devices only"
    major, minor = torch.cuda.get_device_capability(q.device)
    return f"it needs sm_80 or later; this is sm_{major}{minor}" if major < 8 else None


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


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
    *,
    config: Config | None = None,  # for tuning and tests; the committed one when None
) -> None:
    """Fills `out` and `lse`, and the slots of emitting heads in `cached` and `cached_lse`.

    Raises ValueError for an `out` or `cached` whose head width is not contiguous.
    """
    for name, tensor in (("out", out), ("cached", cached)):
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(
                f"block_attention: {name} must have a contiguous head width, strides {tensor.stride()}"
            )
    items = plan.work.shape[0] * q.shape[0]
    if not items:
        return
    capability = (8, 0) if INTERPRETED else torch.cuda.get_device_capability(q.device)
    config = config or config_for(capability, q.shape[-1], q.dtype.itemsize * 8, plan.block)
    # a descriptor's box cannot be masked, and what lies in unseen keys may be NaN
    described = config.descriptors and key_bias is None and valid_keys is None and _can_describe(k, v)
    sizes = constants(q.shape[-1], plan.block, config, described, DTYPES[q.dtype])
    keys, values = (_described(t, sizes) if described else t for t in (k, v))
    bias = None if key_bias is None else key_bias.expand(q.shape[0], q.shape[2], -1)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        attend_blocks[(items,)](
            *(q, keys, values, out, lse, cached, cached_lse, bias, valid_keys),
            *plan.tensors(),
            *(len(plan.q_starts) - 1, k.shape[1], q.shape[0], scale),
            *q.stride()[:3],
            *_stride(k),
            *_stride(v),
            *out.stride()[:3],
            *lse.stride(),
            *((0, 0, 0) if cached is None else cached.stride()[:3]),
            *((0, 0, 0) if cached_lse is None else cached_lse.stride()),
            *((0, 0, 0) if bias is None else bias.stride()),
            **sizes,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,  # Triton 3.10 turns it off unless asked
        )


def constants(width: int, block: int, config: Config, described: bool, dtype: Any) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    rows = max(16, triton.next_power_of_2(block))  # the least that a matrix instruction takes
    block_n = min(rows, config.block_n)
    return {
        "D": width,
        "PADDED": triton.next_power_of_2(width),
        "BLOCK_M": rows,
        "BLOCK_N": block_n,
        "TILES": rows // block_n,
        "DESCRIPTORS": described,
        "STAGES": config.num_stages,
        "DOT": tl.float32 if INTERPRETED else dtype,
    }


def _stride(t: Tensor) -> tuple[int, int, int]:
    """Of the batch, tokens and heads of keys; one sample serves all with a step of 0."""
    return (t.stride(0) if t.shape[0] > 1 else 0, t.stride(1), t.stride(2))


def _can_describe(*tensors: Tensor) -> bool:
    """Whether base and strides are multiples of 16 bytes, as the tensor memory accelerator wants them."""
    return all(
        t.data_ptr() % 16 == 0 and all(step > 0 and step * t.itemsize % 16 == 0 for step in t.stride()[:3])
        for t in tensors
    )


def _described(t: Tensor, sizes: dict[str, Any]) -> TensorDescriptor:
    """Boxes of one sample, BLOCK_N tokens and one head; what lies outside of the tensor reads as 0."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), box(sizes))


def box(sizes: dict[str, Any]) -> list[int]:
    """What one load of a descriptor takes of [B, N, H, D]."""
    return [1, sizes["BLOCK_N"], 1, sizes["PADDED"]]
