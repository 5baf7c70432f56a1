"""history_mix on a device: is it right, and which share of the bandwidth of a copy does it reach.

One slice of scripts/gpu_suite.py; a rehearsal runs it on a CPU with the reference in place of Triton.
Bytes are those that have to be moved: each operand read once, the result written once.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from dit_accel.testing import assert_as_accurate_as
from dit_accel_kernels.history_mix import history_mix, quantize_rows_fp8
from dit_accel_kernels.history_mix.bench import CASES as SPEEDS
from dit_accel_kernels.history_mix.bench import WEIGHTS
from scripts.gpu_attention import seconds
from tests.kernels.mix_cases import CASES, Call, Case, by_definition, by_torch, make, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE = Case((2, 4100, 1536), ("", "", "float8_e4m3fn"), gate=(2, 1, 1536))
SIZE, TINY = (2, 32760, 1536), (2, 50, 64)  # Wan 1.3B at 480p with both branches

Test = tuple[str, Callable[[], str]]


def slice_(suite: Any) -> Iterator[Test]:
    """Every case in every dtype, then the bandwidth of reuse and forecasts."""
    cases = CASES if suite.rehearse else CASES | {"large": LARGE}
    for dtype, name in itertools.product(DTYPES, cases):
        yield f"{name} {str(dtype)[6:]}", functools.partial(check, suite, cases[name], dtype)
    for case in SPEEDS:
        yield f"speed of {case}", functools.partial(bench, suite, case)


def check(suite: Any, case: Case, dtype: torch.dtype) -> str:
    """One case against the equation in float64."""
    call = make(case, dtype)
    out = run(on_device(suite, call), backend_of(suite)).cpu()
    assert_as_accurate_as(out, by_torch(call), by_definition(call))
    return "within the budget"


def on_device(suite: Any, call: Call) -> Call:
    """The call there, with the gaps between rows that it has."""

    def moved(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None:
            return None
        base = t if t._base is None else t._base
        return torch.as_strided(base.to(suite.device), t.shape, t.stride(), t.storage_offset())

    lists: dict[str, Any] = {name: [moved(t) for t in getattr(call, name)] for name in ("ys", "scales")}
    return replace(call, **lists, **{name: moved(getattr(call, name)) for name in ("x", "gate", "out")})


def bench(suite: Any, case: str) -> str:
    """Seconds beside a copy of as many bytes; keeps a line."""
    count, gated, float8 = SPEEDS[case]
    shape, dtype = TINY if suite.rehearse else SIZE, torch.bfloat16
    x, *ys = (torch.randn(shape, device=suite.device, dtype=dtype) for _ in range(count + 1))
    gate = torch.randn(shape[0], 1, shape[2], device=suite.device, dtype=dtype) if gated else None
    kept, scales = zip(*[quantize_rows_fp8(y) if float8 else (y, None) for y in ys], strict=True)
    out = torch.empty_like(x)
    moved = sum(t.nbytes for t in (x, out, *kept))
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=suite.device) for _ in range(2))
    arguments = kept, WEIGHTS[count], x, gate, scales, out
    times = seconds(
        suite,
        {
            "dit_accel": lambda: history_mix(*arguments, backend=backend_of(suite)),
            "copy": lambda: target.copy_(source),
        },
    )
    share = times["copy"] / times["dit_accel"]
    line = {"name": f"dit_accel:{backend_of(suite)}", "shape": {"case": case, "shape": list(shape)}}
    line |= {"seconds": times["dit_accel"], "rivals": {"copy": times["copy"]}, "dtype": "bfloat16"}
    suite.record(what="op", model="history_mix", **line)
    return f"{share:.2f} of the bandwidth of a copy, {moved / times['dit_accel'] / 1e9:.0f} GB/s"


def backend_of(suite: Any) -> str:
    """The slice is about Triton; a rehearsal has the reference in its place."""
    return "reference" if suite.rehearse else "triton"
