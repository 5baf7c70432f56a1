"""Search timelines for a model, verify them on held-out prompts and write them as recipes.

python scripts/search_timeline.py toys/wan --out recipes
"""

import dataclasses
import datetime
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import print as say

from dit_accel.compare import Options, compare
from dit_accel.generate import call_arguments
from dit_accel.loading import load
from dit_accel.prompts import jobs
from dit_accel.recipe import Recipe
from dit_accel.results import append, lines_from
from dit_accel.search.timeline import GOALS, made_by, search, trajectories_of


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
    calibrated = jobs(loaded, None, calibration, seed)
    known = {job.prompt for job in calibrated}
    fresh = [job for job in jobs(loaded, None, calibration + held_out, seed + 500) if job.prompt not in known]
    dense = compare(loaded, Recipe.neutral(), calibrated[:1], arguments).columns["dense"].median_stages()
    share = dense["denoising"] / sum(dense.values())
    trajectories = trajectories_of(loaded, calibrated, arguments, say)
    found = search(loaded, trajectories, calibrated[:measured], arguments, GOALS, share, say)
    for goal, (recipe, _) in found.items():
        result = compare(loaded, recipe, fresh[:held_out], arguments, Options(rival_steps="auto"))
        table = made_by(result, f"python {' '.join(sys.argv)}", _commit(), calibrated)
        named = dataclasses.replace(recipe, name=f"{model}/{goal}", made_by=table)
        say(named.save(out / model / f"{goal}.toml"), result.as_dict()["columns"])
        if results is not None:
            line = dataclasses.replace(result, recipe=named).as_dict()
            append(lines_from(line, commit=_commit(), date=f"{datetime.date.today()}"), results, device)


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
