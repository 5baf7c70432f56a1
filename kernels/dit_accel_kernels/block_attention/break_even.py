"""From which density on dense attention is faster than a backend: measured, stored, looked up.

`break_even.json` beside this file ships what was measured: on CPUs by `scripts/bench_op.py --break-even
--write`, on GPUs by `scripts/gpu_suite.py attention-break-even`. The former with `--keep` writes a user's own
to the cache, which wins for each (backend, processor, dtype) in it.
A row is {"backend", "processor", "dtype", "width", "tokens", "density", "over_sdpa"}: at `density` and below
the backend was no slower than dense SDPA in SDPA's own layout; 1 is always, 0 never.

Between measured tokens or head widths the smaller neighbour counts, beyond the greatest its value. A dtype
that is not measured takes the least of those that are. Below the fewest tokens, and of other processors and
devices, nothing is known: what a recipe asks for is done.
"""

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels import build
from dit_accel_kernels.block_attention.plan import EMITS, BlockPlan
from dit_accel_kernels.dispatch import BackendUnavailable, choose

SHIPPED = Path(__file__).with_suffix(".json")
CPU = torch.device("cpu")
Row = Mapping[str, Any]


def processor(device: torch.device = CPU) -> str:
    """What decides the speed on a device: sm_90 and its like, or the instructions in use of build.LEVELS."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    try:
        return build.chosen_level()
    except build.BuildError:
        return "unknown"


def own_file() -> Path:
    """Where a user's own measurements are kept. Raises build.BuildError as `build.cache_folder` does."""
    return build.cache_folder() / SHIPPED.name


def store(rows: Iterable[Row], file: Path) -> None:
    """Add rows to a file; a row for the same case is replaced."""
    kept = {_case(row): dict(row) for row in (*_read(file), *rows)}
    ordered = [json.dumps(kept[case]) for case in sorted(kept)]
    file.write_text('{"rows": [\n' + ",\n".join(ordered) + "\n]}\n", encoding="utf-8")
    _rows.cache_clear()
    density.cache_clear()


@functools.lru_cache(maxsize=1024)
def density(backend: str, processor: str, dtype: str, width: int, tokens: int) -> float | None:
    """The greatest density at which a backend is no slower than dense, or None where nothing was measured."""
    own = [row for row in _rows() if (row["backend"], row["processor"]) == (backend, processor)]
    measured = {row["dtype"] for row in own}
    found = [
        _at([row for row in own if row["dtype"] == name], width, tokens)
        for name in (measured & {dtype} or measured)
    ]
    return min((value for value in found if value is not None), default=None)


def slower_than_dense(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, backend: str = "auto",
    instead_of: tuple[int, int] | None = None,
) -> str | None:  # fmt: skip
    """Why dense attention would be faster than this plan, as half a sentence, or None.

    `instead_of` are the queries and keys that dense attention has where the plan holds only some of them; its
    density then is over those. None too where a backend is named, where the plan leaves a residual or tail
    behind, which dense cannot, and where nothing was measured.
    """
    named = backend != "auto" or os.environ.get("DIT_ACCEL_BACKEND", "auto") != "auto"
    if named or EMITS & set(plan.kinds) or q.device.type not in ("cpu", "cuda"):
        return None
    try:
        name = choose("block_attention", q=q, k=k, v=v, plan=plan, lse_wanted=False)
    except BackendUnavailable:
        return None
    tokens = plan.tokens if instead_of is None else instead_of
    kept = plan.density * math.prod(plan.tokens) / math.prod(tokens)
    limit = density(name, processor(q.device), str(q.dtype)[6:], q.shape[3], min(tokens))
    if limit is None or kept <= limit:
        return None
    return f'density {kept:.2f} is slower than dense here: backend "{name}" breaks even at {limit:.2f}'


def _at(rows: list[Row], width: int, tokens: int) -> float | None:
    values: list[float] = []
    for near in _neighbours({row["width"] for row in rows}, width):
        of_width = {row["tokens"]: row["density"] for row in rows if row["width"] == near}
        if tokens < min(of_width):
            return None
        values += [of_width[n] for n in _neighbours(of_width, tokens)]
    return min(values)


def _neighbours(known: Iterable[int], value: int) -> set[int]:
    """The nearest known numbers on both sides; one of them beyond the ends."""
    known = sorted(known)
    below, above = [n for n in known if n <= value], [n for n in known if n >= value]
    return {*below[-1:], *above[:1]}


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[Row, ...]:
    """The shipped rows, but for what the user has measured."""
    try:
        own = _read(own_file())
    except build.BuildError:
        own = []
    measured = {_kind(row) for row in own}
    return (*own, *(row for row in _read(SHIPPED) if _kind(row) not in measured))


def _read(file: Path) -> list[Row]:
    """The rows of a file; none where it is missing or cannot be read: a cache is never an error."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _kind(row: Row) -> tuple[str, str, str]:
    return row["backend"], row["processor"], row["dtype"]


def _case(row: Row) -> tuple[str, str, str, int, int]:
    return (*_kind(row), row["width"], row["tokens"])
