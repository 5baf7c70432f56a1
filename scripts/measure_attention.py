"""Measure the attention op inside a pipeline and alone, and add the lines to docs/results.

python scripts/measure_attention.py        toys/wan, 4 held-out prompts, lines to docs/results/cpu.jsonl
python scripts/measure_attention.py --folder /tmp/try --prompts 1 --steps 2 --tokens 512      a trial

Two recipes against stock diffusers: every head `full` through the `cpu` backend, which is equal to rounding,
and every head of the self-attention `brick [1, 1, 1]`. Then scripts/bench_op.py's cases. For a quiet machine.
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dit_accel import results
from dit_accel.cli.asked import load_model
from dit_accel.compare import Options, compare
from dit_accel.loading import Place
from dit_accel.machine import device_name, versions
from dit_accel.prompts import jobs
from dit_accel.recipe import Recipe
from dit_accel_kernels.block_attention import bench

ROOT = Path(__file__).parent.parent
RECIPES = {
    "full-cpu": """
schema = 1

[choices]
F = { method = "full", backend = "cpu" }

[attention.both]
"*" = ["F"]
""",
    "brick-1-1-1": """
schema = 1

[choices]
F = { method = "full", backend = "cpu" }
B = { method = "brick", extent = [1, 1, 1] }

[attention.both]
"*" = ["F"]
"blocks.*.attn1" = ["B"]
""",
}


def main(
    model: str = "toys/wan",
    folder: Annotated[Path, typer.Option(help="where the device's file of lines is")] = ROOT / "docs/results",
    device: Annotated[str, typer.Option(help="its name without .jsonl")] = "cpu",
    prompts: int = 4,
    steps: int | None = None,
    threads: int = 2,
    tokens: int = 4096,
    repeats: int = 7,
) -> None:
    """Lines are added after each measurement."""
    torch.set_num_threads(threads)
    known = {"commit": commit(), "date": datetime.now(UTC).date().isoformat()}
    loaded, arguments = load_model(model, Place(), {"steps": steps})
    tasks = jobs(loaded, None, prompts, seed=2000)
    for name, text in RECIPES.items():
        recipe = Recipe.from_text(text, name=name)
        measured = compare(loaded, recipe, tasks, arguments, Options(strict=True)).as_dict()
        results.append(results.lines_from(measured, **known), folder, device)
        print(f"{name}: {measured['speedup']:.2f}x, {measured['psnr']:.1f} dB", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (64, 128):
            rows = bench.measure(tokens, width, 8, dtype, "auto", repeats, flex=True)
            results.append([{**line_of(row), **known} for row in rows], folder, device)
            print(*(f"{row['case']}: {row['over_sdpa']}x" for row in rows), sep=", ", flush=True)


def line_of(row: dict[str, Any]) -> results.Line:
    """A row of bench_op as a line of docs/results/README.md: seconds beside those of the rivals."""
    seconds = {rival: ms / 1e3 for rival, ms in row["ms"].items()}
    return {
        "what": "op",
        "name": f"block_attention: {row['case']}",
        "shape": {key: row[key] for key in ("tokens", "width", "heads", "density")},
        "dtype": row["dtype"],
        "seconds": seconds.pop("ours"),
        "rivals": seconds,
        "speedup": row["over_sdpa"],
        "versions": versions(),
        "device": device_name(),
    }


def commit() -> str:
    """The checkout that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
