"""block_attention on Hopper (`cuda.cu`): TMA, wgmma and a persistent grid, launched through the driver.

For bfloat16 and float16, head widths 64 and 128, compute capability 9.0. The cubin is released or built by
nvcc (`cuda_builds.py`); PyTorch gives the memory, the context and the stream. `auto` takes this backend only
where the GPU suite has found its numbers right with these very sources (`verified.py`).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.block_attention import cuda_builds, cuda_launch
from dit_accel_kernels.block_attention.cuda_builds import CudaBuild, build_for, find_cubin
from dit_accel_kernels.block_attention.plan import BlockPlan
from dit_accel_kernels.cuda_build import BuildError
from dit_accel_kernels.cuda_driver import DriverError, driver
from dit_accel_kernels.verified import why_unverified

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
ARCHITECTURE = "sm_90"


def why_not(**tensors: Any) -> str | None:
    """The reason why the Hopper kernel cannot take these tensors here, or None; builds it at first use."""
    return _no_device() or _why_not_tensors(**tensors) or _why_not_loaded(tensors["q"])


def why_not_auto(**tensors: Any) -> str | None:
    """The same for a caller who did not ask for it by name: its numbers must have been verified."""
    return (
        _no_device()
        or _why_not_tensors(**tensors)
        or why_unverified("block_attention.cuda", ARCHITECTURE, cuda_builds.numerics_hash())
        or _why_not_loaded(tensors["q"])
    )


def _no_device() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def _why_not_tensors(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    out: Tensor | None = None,
    cached: Tensor | None = None,
    cached_lse: Tensor | None = None,
    **_: Any,
) -> str | None:
    """What of the tensors themselves stands against it."""
    if (here := _device_of(q)) != ARCHITECTURE:
        return f"its instructions are those of sm_90a alone; q is on {here}"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        named = ", ".join(str(t.dtype).removeprefix("torch.") for t in (q, k, v))
        return f"it takes q, k and v of one dtype, bfloat16 or float16; got {named}"
    if q.shape[-1] not in cuda_builds.WIDTHS:
        return f"head width {q.shape[-1]} is none of {', '.join(map(str, cuda_builds.WIDTHS))}"
    if plan.block > cuda_builds.BLOCK:
        return f"blocks of {plan.block} tokens are over {cuda_builds.BLOCK}"
    if cached_lse is not None and cached_lse.dtype is not torch.float32:
        return "cached_lse is not float32"
    return _why_not_layout(q, k, v, plan, {"out": out, "cached": cached}, cached_lse)


def _why_not_layout(q, k, v, plan, written: dict[str, Tensor | None], cached_lse) -> str | None:
    devices = {t.device for t in (q, k, v, plan.work, cached_lse, *written.values()) if t is not None}
    if len(devices) > 1:
        return f"its tensors are on {', '.join(sorted(map(str, devices)))}"
    if cuda_launch.samples(k) != cuda_launch.samples(v):
        return "k and v disagree on whether one sample serves all"
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if reason := cuda_launch.why_not_mapped(name, tensor):
            return reason
    for name, tensor in written.items():
        if tensor is not None and (reason := cuda_launch.why_not_written(name, tensor, q.dtype)):
            return reason
    return None


def _why_not_loaded(q: Tensor) -> str | None:
    with torch.cuda.device(q.device):
        found = _kernel(q.device.index, build_for(q.shape[-1], DTYPES[q.dtype]))
    return found if isinstance(found, str) else None


def _device_of(q: Tensor) -> str:
    return _architecture(q.device) if q.is_cuda else str(q.device)


@functools.cache
def _architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kernel(ordinal: int, build: CudaBuild) -> Any:
    """The loaded kernel, or why there is none: what failed is not tried again at every call."""
    try:
        image = find_cubin(build).read_bytes()
        driver().use_device(ordinal)
        return driver().load_function(image, cuda_builds.KERNEL, build.shared_bytes)
    except (BuildError, DriverError) as error:
        return str(error)


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
    build: CudaBuild | None = None,  # for tuning; the committed one when None
) -> None:
    """Fills `out` and `lse`, and the slots of emitting heads in `cached` and `cached_lse`.

    Raises BuildError for a build that cannot be had, DriverError for a call that the driver refuses.
    """
    if not plan.work.numel() or not q.numel():
        return
    build = build or build_for(q.shape[-1], DTYPES[q.dtype])
    rest = scale, cached, cached_lse, key_bias, valid_keys
    with torch.cuda.device(q.device):
        launch = cuda_launch.prepare(out, lse, q, k, v, plan, *rest, _multiprocessors(q.device))
        kernel = _kernel(q.device.index, build)
        if isinstance(kernel, str):
            raise BuildError(kernel)
        _launch(launch, kernel, build, q.device)


def _launch(launch: cuda_launch.Launch, kernel: Any, build: CudaBuild, device: torch.device) -> None:
    """Queue it on PyTorch's stream; the driver copies maps and arguments before it returns."""
    stream = torch.cuda.current_stream(device).cuda_stream
    driver().use_device(device.index)  # a thread that PyTorch has not used yet has no context
    maps = [driver().tensor_map(*each) for each in launch.maps]
    arguments = [*maps, launch.arguments]
    driver().launch(kernel, launch.grid, cuda_launch.THREADS, build.shared_bytes, stream, arguments)
