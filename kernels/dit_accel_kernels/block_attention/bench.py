"""How fast block_attention is beside dense attention and flex_attention, and from which density on.

All rivals of a case run in turn in every repeat, so that a machine that slows down slows all of them; times
are medians. A window of consecutive key blocks stands for every list: contents do not change the work.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel_kernels.block_attention import Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.block_attention.break_even import CPU, processor
from dit_accel_kernels.block_attention.plan import BlockPlan

BLOCK = 128
DENSITIES = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0625)
MARGIN = 1.1  # a machine is never quiet: what is only as fast as SDPA in one hour is slower in the next
MIXED = (1, 1, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625)
# name -> densities, repeated over the heads; None is a head that is only reused (kind SKIP)
CASES = {
    "density 1": (1,),
    "density 0.25": (0.25,),
    "mixed " + " ".join(str(d) for d in MIXED): MIXED,
    "half the heads reused (SKIP), half at density 0.25": (0.25, None),
    "half the heads reused (COPY), half at density 0.25": (0.25, Kind.COPY),
}


def window(blocks: int, density: float) -> Tensor:
    """Bool [blocks, blocks]: for each row, consecutive blocks around the diagonal, at least one."""
    width = max(1, round(blocks * density))
    first = (torch.arange(blocks) - width // 2).clamp(0, blocks - width)[:, None]  # [blocks, 1]
    place = torch.arange(blocks)
    return (place >= first) & (place < first + width)


def plan_of(tokens: int, heads: int, densities: tuple[Any, ...]) -> BlockPlan:
    """Heads with these densities in turn; None stands for SKIP, and a kind for itself."""
    starts = starts_of(tokens, BLOCK)
    given = [densities[head % len(densities)] for head in range(heads)]
    kinds = [Kind.SKIP if d is None else d if isinstance(d, Kind) else Kind.ATTEND for d in given]
    near = [
        window(len(starts) - 1, d if kind is Kind.ATTEND else 1) for d, kind in zip(given, kinds, strict=True)
    ]
    return plan_blocks(near, starts, starts, kinds, block=BLOCK)


def flex_of(plan: BlockPlan) -> Callable[..., Tensor]:
    """Compiled flex_attention over the same lists; a head that is reused gets no block."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    rows = len(plan.q_starts) - 1
    lengths = plan.pointers.diff().view(-1, rows)[plan.pattern.long()]  # [H, NQ], near and rest
    near = (plan.split - plan.pointers[:-1]).view(-1, rows)[plan.pattern.long()]
    attends = torch.tensor([kind is Kind.ATTEND for kind in plan.kinds])[:, None]
    count = torch.where(attends, near, 0).int()[None]  # [1, H, NQ]
    lists = torch.zeros(*lengths.shape, len(plan.k_starts) - 1, dtype=torch.int32)
    for head, pattern in enumerate(plan.pattern.tolist()):
        for row in range(rows):
            at = int(plan.pointers[pattern * rows + row])
            n = int(near[head, row])
            lists[head, row, :n] = plan.indices[at : at + n]
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(count), torch.zeros_like(lists)[None], count, lists[None], BLOCK_SIZE=BLOCK
    )
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def medians(
    runs: dict[str, Callable[[], Any]], repeats: int, wait: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Milliseconds of each, one after the other in every repeat; `wait` returns when the device is done."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    wait()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure(
    tokens: int, width: int, heads: int, dtype: torch.dtype, backend: str, repeats: int, flex: bool
) -> list[dict[str, Any]]:
    """One row per case: ms of each rival, dense SDPA's over ours, GFLOP/s on the blocks executed."""
    q, k, v, kept = (torch.randn(1, tokens, heads, width).to(dtype) for _ in range(4))
    dense_q, dense_k, dense_v = dense = [
        t.transpose(1, 2).contiguous() for t in (q, k, v)
    ]  # SDPA's own layout
    rows = []
    for name, densities in CASES.items():
        plan = plan_of(tokens, heads, densities)
        out, cached = torch.empty_like(q), kept[:, :, : plan.num_cached]
        runs = {
            "ours": lambda p=plan, o=out, c=cached: block_attention(
                q, k, v, p, out=o, cached=c if p.num_cached else None, backend=backend
            ),
            "sdpa": lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v),
        }
        if flex:
            flex_run = flex_of(plan)
            runs["flex"] = lambda run=flex_run: run(*dense)
        ms = medians(runs, repeats)
        operations = 4 * plan.pairs * BLOCK**2 * width
        rows.append(
            {
                "case": name,
                "density": round(plan.density, 4),
                "tokens": tokens,
                "width": width,
                "heads": heads,
                "dtype": str(dtype)[6:],
                "ms": {rival: round(value, 3) for rival, value in ms.items()},
                "over_sdpa": round(ms["sdpa"] / ms["ours"], 2),
                "gflop_per_s": round(operations / ms["ours"] / 1e6, 1),
            }
        )
    return rows


@torch.no_grad()
def break_even(
    tokens: int,
    width: int,
    heads: int,
    dtype: torch.dtype,
    backend: str,
    repeats: int,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """A row of break_even.json: the largest density tried that beats dense SDPA by MARGIN; else 0."""
    q, k, v = (torch.randn(1, tokens, heads, width).to(device, dtype) for _ in range(3))
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    dense_q, dense_k, dense_v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    tried: dict[float, float] = {}
    found = 0.0
    for density in DENSITIES:
        plan = plan_of(tokens, heads, (density,)).to(device)
        if plan.density in tried:  # few blocks: rounded up to one that was tried
            continue
        ms = medians(
            {
                "ours": lambda p=plan: block_attention(q, k, v, p, backend=backend, lse_wanted=False),
                "sdpa": lambda: F.scaled_dot_product_attention(dense_q, dense_k, dense_v),
            },
            repeats,
            wait,
        )
        tried[plan.density] = ms["sdpa"] / ms["ours"]
        if tried[plan.density] >= MARGIN:
            found = plan.density
            break
    return {
        "backend": backend,
        "processor": processor(device),
        "dtype": str(dtype)[6:],
        "width": width,
        "tokens": tokens,
        "density": round(found, 4),
        "over_sdpa": {str(round(density, 4)): round(ratio, 2) for density, ratio in tried.items()},
    }
