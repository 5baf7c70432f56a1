"""block_attention on a device: is it right, which tiles are fastest, what does it reach beside its rivals.

Four slices of scripts/gpu_suite.py; a rehearsal runs them on a CPU with the reference in place of Triton.
TFLOP/s count the block pairs that are attended, 4 * 128 * 128 * D operations each, and no masked ones.
"""

import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.testing import assert_as_accurate_as
from dit_accel_kernels import verified
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.block_attention import bench as op_bench
from dit_accel_kernels.block_attention.break_even import store
from dit_accel_kernels.block_attention.triton_configs import Config, architecture
from tests.kernels.block_cases import CASES, Call, by_definition, by_torch, make

BLOCK = 128
DENSITIES = (1.0, 0.5, 0.25, 0.1)
MIXED = (1.0, 1.0, 0.25, 0.25, 0.125, 0.125, 0.0625, 0.0625)
CANDIDATES = [Config(*c) for c in itertools.product((32, 64, 128), (4, 8), (1, 2, 3, 4), (False, True))]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RUNS = 10

Case = tuple[str, Callable[[], str]]


def correct(suite: Any) -> Iterator[Case]:
    """Every case of the tests in every dtype, through descriptors and by pointers."""
    for dtype, name in itertools.product(DTYPES, CASES):
        yield f"{name} {_short(dtype)}", functools.partial(check_case, suite, name, dtype)
    for width, described in itertools.product((64, 72, 128), (False, True)):
        label = f"long D={width} {'descriptors' if described else 'pointers'}"
        yield label, functools.partial(check_long, suite, width, described)


def check_case(suite: Any, name: str, dtype: torch.dtype, width: int | None = None) -> str:
    """One case, in its own head width or another, against the op's equations in float64."""
    case = CASES[name]
    call = make(case if width is None else replace(case, width=width), dtype)
    ours, exact, plain = on_device(suite, call), by_definition(call), by_torch(call)
    for key in (key for key in ours if exact[key] is not None):
        unknown, infinite = exact[key].isnan(), exact[key].isinf()
        if not torch.equal(ours[key].isnan(), unknown) or not torch.equal(ours[key].isinf(), infinite):
            raise AssertionError(f"{key}: not finite at other places than the equations")
        known = ~(unknown | infinite)
        if known.any():
            assert_as_accurate_as(ours[key][known], plain[key][known], exact[key][known])
    return "within the budget"


def on_device(suite: Any, call: Call) -> dict[str, Tensor]:
    """The op's results for a call on the suite's device, back on the CPU."""
    # emitting heads write into these
    moved = {n: t.to(suite.device, copy=True) for n, t in call.options.items()}
    q, k, v = (_as_strided(t, suite.device) for t in (call.q, call.k, call.v))
    plan = call.plan.to(suite.device)
    out, lse = block_attention(q, k, v, plan, backend=backend_of(suite), **moved)
    results = {"out": out, "lse": lse} | {n: moved[n] for n in ("cached", "cached_lse") if n in moved}
    return {name: tensor.cpu() for name, tensor in results.items()}


def _as_strided(t: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that keeps gaps between tokens and heads, which `.to` would close."""
    base = t if t._base is None else t._base
    return torch.as_strided(base.contiguous().to(device), t.shape, t.stride(), t.storage_offset())


def check_long(suite: Any, width: int, described: bool | None) -> str:
    """A long sequence, sparse, described or not: against the reference in float32 on the same device."""
    tokens, heads = (300, 2) if suite.rehearse else (16384, 4)
    q, k, v = _normal(suite, tokens, heads, width)
    plan = window_plan(tokens, [0.25] * heads, suite.device)
    config = None if described is None else Config(64, 8 if width > 64 else 4, 2, described)
    out = _runner(suite, config)(q, k, v, plan)
    exact, _ = block_attention(q.float(), k.float(), v.float(), plan, backend="reference")
    plain, _ = block_attention(q, k, v, plan, backend="reference")
    assert_as_accurate_as(out.cpu(), plain.cpu(), exact.cpu().double())
    return "within the budget"


def tune(suite: Any) -> Iterator[Case]:
    """The fastest tiles for each head width; the line it prints belongs into triton_configs.json."""
    for width in (32, 64, 128):
        yield f"D={width}", functools.partial(tune_width, suite, width)


def tune_width(suite: Any, width: int) -> str:
    """Times every candidate, dense and at a quarter; the sum decides."""
    best = fastest(suite, width, CANDIDATES, _runner)
    arch = 0 if suite.rehearse else architecture(torch.cuda.get_device_capability(suite.device))
    return f"arch {arch}, width {width}: {best}"


def fastest(suite: Any, width: int, candidates: Sequence[Any], runner: Callable[[Any, Any], Any]) -> Any:
    """The candidate whose `runner(suite, candidate)` takes the least, dense and at a quarter together."""
    tokens, heads = (300, 2) if suite.rehearse else (16384, 24)
    q, k, v = _normal(suite, tokens, heads, width)
    plans = [window_plan(tokens, [density] * heads, suite.device) for density in (1.0, 0.25)]
    found: list[tuple[float, Any]] = []
    for config in candidates[:2] if suite.rehearse else candidates:
        run = runner(suite, config)
        try:
            times = [seconds(suite, {"": functools.partial(run, q, k, v, plan)})[""] for plan in plans]
        except Exception as error:  # more shared memory or registers than there are: no candidate
            print(f"  {config}: {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        print(f"  {config}: {' '.join(f'{1e3 * t:.2f}' for t in times)} ms", flush=True)
        found.append((times[0] + 4 * times[1], config))
    total, best = min(found, key=lambda pair: pair[0])
    shape = {"tokens": tokens, "heads": heads, "width": width}
    suite.record(what="op", model="block_attention", name=f"tuned:{best}", shape=shape, seconds=total / 2)
    return best


def bench(suite: Any) -> Iterator[Case]:
    """N 32k, D 128, 24 heads: dense and sparse, beside the fastest dense and the sparse rivals."""
    for label, densities in {**{f"density {d}": (d,) * 8 for d in DENSITIES}, "mixed": MIXED}.items():
        yield label, functools.partial(bench_density, suite, label, densities)
    if importlib.util.find_spec("fastvideo_kernel"):
        yield "sliding tiles", functools.partial(bench_tiles, suite)


def bench_density(suite: Any, label: str, densities: tuple[float, ...]) -> str:
    """Median seconds of ours, dense and flex, interleaved; every rival that fails says why."""
    tokens, heads, width = (256, 8, 64) if suite.rehearse else (32768, 24, 128)
    q, k, v = _normal(suite, tokens, heads, width)
    per_head = [densities[head * 8 // heads] for head in range(heads)]
    plan = window_plan(tokens, per_head, suite.device)
    rows: dict[str, Callable[[], Any]] = {"dit_accel": functools.partial(_runner(suite), q, k, v, plan)}
    rows |= dense_rows(q, k, v)
    if backend_of(suite) == "cuda":
        rows["triton"] = functools.partial(_runner(replace(suite, backend="triton")), q, k, v, plan)
    if not suite.rehearse:  # compiling it for a CPU takes longer than a test may
        rows["flex_attention"] = flex_row(q, k, v, lists(tokens, per_head))
    return report(suite, label, seconds(suite, rows), plan, (tokens, heads, width))


def bench_tiles(suite: Any) -> str:
    """fastvideo-kernel's sliding tile attention, 36x48x48 tokens in tiles of 6x8x8, windows of 3 tiles."""
    from fastvideo_kernel import sliding_tile_attention  # pyright: ignore[reportMissingImports]

    grid, heads, width = (6, 6, 6), 24, 128
    tokens = 6 * 6 * 6 * 384
    q, k, v = _normal(suite, tokens, heads, width)
    near = tile_windows(grid, 3).repeat_interleave(3, 0).repeat_interleave(3, 1)  # 384 tokens: three blocks
    plan = plan_blocks(near[None], starts_of(tokens), starts_of(tokens), [Kind.ATTEND] * heads, [0] * heads)
    plan = plan.to(suite.device)
    theirs = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    windows = [[3, 3, 3]] * heads
    rows = {
        "dit_accel": functools.partial(_runner(suite), q, k, v, plan),
        "fastvideo_sta": lambda: sliding_tile_attention(*theirs, windows, 0, False, "36x48x48"),
    } | dense_rows(q, k, v)
    return report(suite, "sliding tiles", seconds(suite, rows), plan, (tokens, heads, width))


def break_even(suite: Any) -> Iterator[Case]:
    """Up to which density each backend is faster than dense; `auto` reads what this writes."""
    backends = ["triton", *(["cuda"] if _cuda_is_verified(suite) else [])]
    widths, tokens = (
        ((64,), (256,)) if suite.rehearse else ((64, 128), (1024, 2048, 4096, 8192, 16384, 32768))
    )
    for backend, width, n in itertools.product(backends, widths, tokens):
        label = f"{backend} D={width} {n} tokens"
        yield label, functools.partial(break_even_at, replace(suite, backend=backend), width, n)


def break_even_at(suite: Any, width: int, tokens: int) -> str:
    """One row of break_even.json, in bfloat16; a rehearsal writes none."""
    shape = tokens, width, 2 if suite.rehearse else 16, torch.bfloat16, backend_of(suite)
    row = op_bench.break_even(*shape, 2 if suite.rehearse else RUNS, suite.device)
    if not suite.rehearse:
        store([row], suite.break_even)
    return f"{row['density']:g}; speed over SDPA by density {row['over_sdpa']}"


def _cuda_is_verified(suite: Any) -> bool:
    if suite.rehearse:
        return False
    from dit_accel_kernels.block_attention.cuda_builds import numerics_hash

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(suite.device))
    return verified.why_unverified("block_attention.cuda", arch, numerics_hash(), suite.verified) is None


def tile_windows(grid: tuple[int, int, int], extent: int) -> Tensor:
    """Bool [tiles, tiles]: the cube of `extent` tiles around each, pushed inward at the border."""
    near = torch.ones(1, 1, dtype=torch.bool)
    for size in grid:
        place = torch.arange(size)
        centre = place.clamp(extent // 2, size - 1 - extent // 2)
        axis = (place[None] - centre[:, None]).abs() <= extent // 2
        near = (near[:, None, :, None] & axis[None, :, None, :]).reshape(len(near) * size, -1)
    return near


def lists(tokens: int, densities: list[float]) -> Tensor:
    """Bool [H, NQ, NK]: for each block of queries the nearest blocks of keys, as many as the density says."""
    blocks = -(-tokens // BLOCK)
    distance = (torch.arange(blocks)[None] - torch.arange(blocks)[:, None]).abs()
    rank = distance.argsort(dim=1, stable=True).argsort(dim=1)
    return torch.stack([rank < max(1, round(density * blocks)) for density in densities])


def window_plan(tokens: int, densities: list[float], device: torch.device) -> BlockPlan:
    """Heads that attend, one pattern for each density."""
    kinds = [Kind.ATTEND] * len(densities)
    patterns = sorted(set(densities))
    near, starts = lists(tokens, patterns), starts_of(tokens, BLOCK)
    return plan_blocks(
        near, starts, starts, kinds, [patterns.index(d) for d in densities], block=BLOCK, device=device
    )


def dense_rows(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """Dense attention by every implementation that PyTorch has here."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    names = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}
    return {name: functools.partial(run, backend) for name, backend in names.items()}


def flex_row(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Callable[[], Any]:
    """Compiled flex_attention over the same lists, every block a full one."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = near.sum(2, dtype=torch.int32)[None].to(q.device)
    order = near.int().argsort(dim=2, descending=True, stable=True).int()[None].to(q.device)
    none = torch.zeros_like(counts), torch.zeros_like(order)
    mask = BlockMask.from_kv_blocks(*none, counts, order, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=mask)


def seconds(suite: Any, rows: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, interleaved, after a warm-up; what fails is said and left out, but not ours."""
    runs: dict[str, list[float]] = {}
    for name, run in rows.items():
        try:
            run()
            runs[name] = []
        except Exception as error:
            if name in ("", "dit_accel"):
                raise
            print(f"  {name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
    for _ in range(2 if suite.rehearse else RUNS):
        for name, each in runs.items():
            each.append(_once(suite, rows[name]))
    return {name: statistics.median(each) for name, each in runs.items()}


def _once(suite: Any, run: Callable[[], Any]) -> float:
    if suite.device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def report(
    suite: Any, label: str, times: dict[str, float], plan: BlockPlan, size: tuple[int, int, int]
) -> str:
    """Keeps a line for each row; says TFLOP/s of ours, and how near to ideal over the fastest dense."""
    tokens, heads, width = size
    dense = min((t for name, t in times.items() if name.startswith("sdpa")), default=None)
    tera = 4 * BLOCK * BLOCK * width * plan.pairs / times["dit_accel"] / 1e12
    shape = {"tokens": tokens, "heads": heads, "width": width, "density": plan.density, "case": label}
    for name, each in times.items():
        speed = {} if dense is None else {"speedup": dense / each}
        suite.record(
            what="op",
            model="block_attention",
            name=f"dit_accel:{suite.backend}" if name == "dit_accel" else name,
            shape=shape,
            dtype="bfloat16",
            seconds=each,
            **speed,
        )
    said = ", ".join(f"{name} {1e3 * each:.2f} ms" for name, each in times.items())
    ideal = "" if dense is None else f", {dense * plan.density / times['dit_accel']:.2f} of ideal"
    return f"{tera:.3g} TFLOP/s on attended blocks{ideal}; {said}"


def _runner(
    suite: Any, config: Config | None = None
) -> Callable[[Tensor, Tensor, Tensor, BlockPlan], Tensor]:
    """Ours, with given tiles or the committed ones."""

    def run(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Tensor:
        if config is None or suite.rehearse:
            return block_attention(q, k, v, plan, backend=backend_of(suite))[0]
        from dit_accel_kernels.block_attention import triton

        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], device=q.device)
        scale = q.shape[-1] ** -0.5
        triton.block_attention(out, lse, q, k, v, plan, scale, None, None, None, None, config=config)
        return out

    return run


def backend_of(suite: Any) -> str:
    """Which backend a slice is about; a rehearsal has the reference in its place."""
    return "reference" if suite.rehearse else suite.backend


def _normal(suite: Any, tokens: int, heads: int, width: int) -> list[Tensor]:
    """q, k, v [1, N, H, D] in bfloat16."""
    generator = torch.Generator(suite.device).manual_seed(0)
    shape = (1, tokens, heads, width)
    return [
        torch.randn(shape, generator=generator, device=suite.device, dtype=torch.bfloat16) for _ in range(3)
    ]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
