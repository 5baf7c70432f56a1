"""Measure an op beside its rivals and write JSON: ms, ratio to dense SDPA, GFLOP/s on what was executed.

python scripts/bench_op.py block_attention --json -
python scripts/bench_op.py block_attention --break-even --tokens 4096 --json out.json
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from dit_accel_kernels.block_attention import bench

OPS = ("block_attention",)
Numbers = Annotated[list[int] | None, typer.Option()]


def main(
    op: str,
    json_to: Annotated[str, typer.Option("--json", help="a file, or - for the terminal")] = "-",
    tokens: int = 4096,
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
) -> None:
    """Widths 64 and 128 and dtypes float32 and bfloat16 unless named."""
    if op not in OPS:
        raise typer.BadParameter(f"{op} is not measured here, only {', '.join(OPS)}")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = []
    for name in dtype or ["float32", "bfloat16"]:
        for d in width or [64, 128]:
            shape = tokens, d, heads, getattr(torch, name), backend, repeats
            rows += [bench.break_even(*shape)] if break_even else bench.measure(*shape, flex)
    about = {"op": op, "threads": threads, "torch": torch.__version__, "processor": platform.processor()}
    text = json.dumps({**about, "rows": rows}, indent=1)
    if json_to == "-":
        print(text)
    else:
        Path(json_to).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
