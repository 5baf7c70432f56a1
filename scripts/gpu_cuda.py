"""block_attention's Hopper kernel on a device: is it right, how many stages are fastest, what does it reach.

Three slices of scripts/gpu_suite.py, on the checks and rivals of `gpu_attention.py`. When every check of the
first has passed, it writes the line of `verified.json` that lets `auto` choose the kernel: commit that file.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dit_accel.machine import device_name
from dit_accel_kernels import verified
from dit_accel_kernels.block_attention import Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.block_attention.cuda_builds import MOST_SHARED, WIDTHS, CudaBuild, numerics_hash
from scripts import gpu_attention
from scripts.gpu_attention import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAME = "block_attention.cuda"


def correct(suite: Any) -> Iterator[Case]:
    """From one tile of integers to every case of the tests and long sequences; then the record."""
    suite, checks = replace(suite, backend="cuda"), 0
    for width, dtype in itertools.product(WIDTHS, DTYPES.values()):
        yield f"integers D={width} {dtype}", functools.partial(check_integers, suite, width, dtype)
        for name in gpu_attention.CASES:
            label = f"{name} D={width} {dtype}"
            yield label, functools.partial(gpu_attention.check_case, suite, name, dtype, width)
        checks += 1 + len(gpu_attention.CASES)
    for width in WIDTHS:
        yield f"long D={width}", functools.partial(gpu_attention.check_long, suite, width, None)
        checks += 1
    yield "record", functools.partial(keep_record, suite, checks)


def check_integers(suite: Any, width: int, dtype: torch.dtype) -> str:
    """One block of queries and one of keys, integers: each output row is its one key's values."""
    device, tokens = suite.device, gpu_attention.BLOCK
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    bits = torch.arange(tokens)[:, None] >> torch.arange(7) & 1  # [128, 7]: a key's number in binary
    k = torch.zeros(tokens, width).index_copy_(1, torch.arange(7) * 9, 2.0 * bits - 1)
    v = (torch.arange(tokens)[:, None] * 3 + torch.arange(width) * 5) % 17.0 - 8
    q, k, v = (t[None, :, None].to(device, dtype) for t in (64 * k[order], k, v))
    starts = starts_of(tokens)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [Kind.ATTEND], device=device)
    # the right key scores 64 * 7, every other at most 64 * 5: e^-128 is nothing beside 1
    out, lse = block_attention(q, k, v, plan, scale=1.0, backend=gpu_attention.backend_of(suite))
    wrong = (out != v[:, order.to(device)]).any(-1).sum().item()
    if wrong or not torch.equal(lse.cpu(), torch.full((1, tokens, 1), 448.0)):
        raise AssertionError(f"{wrong} rows of {tokens} are not their key's values; lse {lse.flatten()[:4]}")
    return "exact"


def keep_record(suite: Any, checks: int) -> str:
    """The line that lets `auto` choose the kernel, if nothing of this slice has failed."""
    if failed := [each for each in suite.failures if each.startswith("cuda: ")]:
        raise AssertionError(f"{len(failed)} checks failed, so nothing is recorded")
    if suite.rehearse:
        return f"{checks} checks; a rehearsal verifies nothing"
    line = {"arch": "sm_{}{}".format(*torch.cuda.get_device_capability(suite.device)), "checks": checks}
    line |= {"sources": numerics_hash(), "device": device_name()} | suite.made_now()
    verified.record(NAME, line, suite.verified)
    suite.record(what="op", model="block_attention", name="verified:cuda", counters={"checks": checks})
    return f"{checks} checks, recorded in {suite.verified}"


def tune(suite: Any) -> Iterator[Case]:
    """The fastest number of stages for each head width; it belongs into cuda_builds.STAGES."""
    for width in WIDTHS:
        yield f"D={width}", functools.partial(tune_width, replace(suite, backend="cuda"), width)


def candidates(width: int) -> list[CudaBuild]:
    """Every number of stages that fits into shared memory."""
    every = [CudaBuild(width, "bf16", stages) for stages in range(1, 9)]
    return [build for build in every if build.shared_bytes <= MOST_SHARED]


def tune_width(suite: Any, width: int) -> str:
    """Times every candidate, dense and at a quarter; the sum decides."""
    found = gpu_attention.fastest(suite, width, candidates(width), runner)
    return f"width {width}: {found.stages} stages"


def runner(suite: Any, build: CudaBuild) -> Any:
    """The op with a given build."""

    def run(q, k, v, plan):
        if suite.rehearse:
            return block_attention(q, k, v, plan, backend="reference")[0]
        from dit_accel_kernels.block_attention import cuda

        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device)
        rest = q.shape[-1] ** -0.5, None, None, None, None
        cuda.block_attention(out, lse, q, k, v, plan, *rest, build=build)
        return out

    return run


def bench(suite: Any) -> Iterator[Case]:
    """As attention-bench, with Triton among the rivals."""
    yield from gpu_attention.bench(replace(suite, backend="cuda"))
