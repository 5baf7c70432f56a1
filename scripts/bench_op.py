"""Measure an op beside its rivals and write JSON: ms, ratio to dense SDPA, GFLOP/s on what was executed; of
history_mix the ratio to PyTorch's own operations in the same dtype, and GB/s over what has to be moved.

python scripts/bench_op.py block_attention --json -
python scripts/bench_op.py history_mix --threads 1 --backend cpu --json -
python scripts/bench_op.py block_attention --break-even --backend cpu --tokens 512 --tokens 4096 --keep

--break-even finds the density from which on dense SDPA is faster: --keep writes it to your cache, where
`auto` looks first, --write to the file that the package ships.
"""

import itertools
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from dit_accel_kernels.block_attention import bench
from dit_accel_kernels.block_attention.break_even import SHIPPED, own_file, store
from dit_accel_kernels.history_mix import bench as mix_bench

OPS = ("block_attention", "history_mix")
Numbers = Annotated[list[int] | None, typer.Option()]


def main(
    op: str,
    json_to: Annotated[str, typer.Option("--json", help="a file, or - for the terminal")] = "-",
    tokens: Numbers = None,
    width: Numbers = None,
    heads: int = 8,
    dtype: Annotated[list[str] | None, typer.Option()] = None,
    threads: int = 2,
    repeats: int = 7,
    backend: str = "auto",
    flex: bool = True,
    break_even: Annotated[
        bool, typer.Option("--break-even", help="find the density that beats SDPA")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="for this user")] = False,
    write: Annotated[bool, typer.Option("--write", help="for everybody")] = False,
) -> None:
    """4096 tokens, widths 64 and 128, float32 and bfloat16 unless named; history_mix has its own shapes."""
    if break_even and backend == "auto":
        raise typer.BadParameter("--break-even is of one backend: name it with --backend")
    if op == "history_mix" and (break_even or tokens or width):
        raise typer.BadParameter(
            "history_mix has shapes of its own, and no table of --break-even: leave them away"
        )
    if op not in OPS:
        raise typer.BadParameter(f"{op} is not measured here, only {', '.join(OPS)}")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    dtypes = dtype or ["float32", "bfloat16"]
    rows = []
    if op == "history_mix":
        rows = list(mix_bench.rows([getattr(torch, name) for name in dtypes], backend, repeats))
        dtypes = []
    for name, d, n in itertools.product(dtypes, width or [64, 128], tokens or [4096]):
        shape = n, d, heads, getattr(torch, name), backend, repeats
        if not break_even:
            rows += bench.measure(*shape, flex)
            continue
        rows.append(bench.break_even(*shape))
        for wanted, file in ((keep, own_file), (write, lambda: SHIPPED)):
            if wanted:  # after each case: a long list may be cut short
                store(rows[-1:], file())
    about = {"op": op, "threads": threads, "torch": torch.__version__, "processor": platform.processor()}
    text = json.dumps({**about, "rows": rows}, indent=1)
    if json_to == "-":
        print(text)
    else:
        Path(json_to).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
