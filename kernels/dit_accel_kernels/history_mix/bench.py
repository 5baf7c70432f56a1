"""How fast history_mix is beside PyTorch's own operations in the same dtype, on a CPU.

All rivals of a case run in turn in every repeat, so that a machine that slows down slows all of them; times
are medians.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dit_accel_kernels.block_attention.bench import medians
from dit_accel_kernels.history_mix import history_mix, plain, quantize_rows_fp8

SHAPES = ((1, 64, 64), (1, 256, 256), (1, 1024, 256), (1, 2304, 256), (2, 8190, 1536), (2, 32760, 1536))
FEW_SECONDS = 1 << 26  # numbers in all repeats
WEIGHTS = {1: (1.0,), 2: (1.5, -0.5), 3: (3.0, -3.0, 1.0)}
# name -> (ys, gated, float8)
CASES = {
    "reuse": (1, False, False),
    "gated reuse": (1, True, False),
    "gated forecast of 2": (2, True, False),
    "gated forecast of 3": (3, True, False),
    "gated forecast of 2 in float8": (2, True, True),
}


def rows(dtypes: Sequence[torch.dtype], backend: str, repeats: int) -> Iterator[dict[str, Any]]:
    """A row for every case, shape and dtype; small shapes are repeated more often."""
    for dtype, shape, case in itertools.product(dtypes, SHAPES, CASES):
        numbers = math.prod(shape)
        yield measure(shape, case, dtype, backend, max(repeats, min(400, FEW_SECONDS // numbers)))


@torch.no_grad()
def measure(
    shape: tuple[int, int, int], case: str, dtype: torch.dtype, backend: str, repeats: int
) -> dict[str, Any]:
    """One row: ms of ours and of PyTorch's chain, their ratio, GB/s of ours over what has to be moved."""
    count, gated, float8 = CASES[case]
    x, *ys = (torch.randn(shape, dtype=dtype) for _ in range(count + 1))
    gate = torch.randn(shape[0], 1, shape[2], dtype=dtype) if gated else None
    out, weights = torch.empty_like(x), WEIGHTS[count]
    stored = [quantize_rows_fp8(y) if float8 else (y, None) for y in ys]
    kept, scales = zip(*stored, strict=True)

    def rival() -> None:
        """PyTorch reads float8 into the dtype first."""
        read = [y if s is None else y.to(dtype) * s.to(dtype) for y, s in stored]
        plain.mix(out, read, weights, x, gate)

    def ours() -> None:
        history_mix(kept, weights, x, gate, scales, out, backend=backend)

    runs = {"ours": ours, "torch": rival}
    ms = medians(runs, repeats)
    moved = sum(t.nbytes for t in (x, out, *kept))
    return {
        "case": case,
        "shape": list(shape),
        "dtype": str(dtype)[6:],
        "backend": backend,
        "ms": {name: round(value, 4) for name, value in ms.items()},
        "over_torch": round(ms["torch"] / ms["ours"], 2),
        "gb_per_s": round(moved / ms["ours"] / 1e6, 1),
    }
