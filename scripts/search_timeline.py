"""Search timelines for a model, verify them on held-out prompts and write them as recipes.

python scripts/search_timeline.py toys/wan --out recipes

The same as `dit-accel search --method timeline`, where it is explained.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import print as say

from dit_accel.generate import call_arguments
from dit_accel.loading import load
from dit_accel.search.outcome import Ending, split_jobs
from dit_accel.search.timelines.search import GOALS, write_recipes


def main(
    model: Annotated[str, typer.Argument(help="A folder, a toy's name or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Recipes are written to OUT/MODEL/GOAL.toml.")] = Path("recipes"),
    steps: Annotated[int | None, typer.Option(help="Sampler steps; the model's own if not given.")] = None,
    calibration: Annotated[int, typer.Option(help="Prompts whose dense runs are searched.")] = 4,
    measured: Annotated[int, typer.Option(help="Of these, prompts on which candidates are measured.")] = 2,
    held_out: Annotated[int, typer.Option(help="Prompts to verify on.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first calibration prompt.")] = 1000,
    results: Annotated[Path | None, typer.Option(help="Folder of result lines to append to.")] = None,
    device: Annotated[str, typer.Option(help="Name of the result file in that folder.")] = "cpu",
) -> None:
    """Search, verify, write."""
    loaded = load(model)
    arguments = call_arguments(loaded, {} if steps is None else {"steps": steps})
    calibrated, fresh = split_jobs(loaded, None, calibration, held_out, seed)
    ending = Ending(calibrated, fresh, f"python {' '.join(sys.argv)}", results, device)
    write_recipes(loaded, arguments, ending, GOALS, out, say, measured)


if __name__ == "__main__":
    typer.run(main)
