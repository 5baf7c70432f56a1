"""The end of every search: a recipe measured on held-out prompts, its [made_by], its file and lines."""

import dataclasses
import datetime
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.compare import Comparison, Job, Options, Watch, compare
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.machine import version_of
from dit_accel.prompts import jobs, read_prompts
from dit_accel.recipe import Recipe
from dit_accel.results import append, lines_from

PLACES = ("--out", "-o", "--results", "--html", "--prompts")  # their values are paths of somebody's machine


@dataclass(frozen=True)
class Ending:
    """What a search leaves behind besides its recipe."""

    calibration: Sequence[Job]
    held_out: Sequence[Job]
    command: str
    results: Path | None = None  # a folder of result lines to append to
    results_name: str = "cpu"


def split_jobs(
    model: Model, file: Path | None, calibration: int, held_out: int, seed: int
) -> tuple[list[Job], list[Job]]:
    """Prompts to search on and others to verify on: of a file its first lines and the next ones."""
    if file is not None:
        known = read_prompts(file)
        if len(known) <= calibration:
            raise BadUsage(
                f"asked to search on {calibration} prompts of {file} and to verify on others; it has "
                f"{len(known)}. Give more, or a smaller --num-prompts."
            )
        every = [Job(prompt, seed + index) for index, prompt in enumerate(known)]
        return every[:calibration], every[calibration : calibration + held_out]
    calibrated = jobs(model, None, calibration, seed)
    known = {job.prompt for job in calibrated}
    fresh = [job for job in jobs(model, None, calibration + held_out, seed + 500) if job.prompt not in known]
    return calibrated, fresh[:held_out]


def finish(
    model: Model, recipe: Recipe, arguments: Mapping[str, Any], file: Path, ending: Ending,
    watch: Watch | None = None, more: Mapping[str, Any] | None = None,
) -> tuple[Recipe, Comparison]:  # fmt: skip
    """Measure a recipe on held-out prompts beside dense and fewer steps; write it with the numbers."""
    result = compare(model, recipe, ending.held_out, arguments, Options(rival_steps="auto"), watch)
    table = made_by(result, ending.command, commit(), ending.calibration) | dict(more or {})
    named = dataclasses.replace(recipe, made_by=table)
    named.save(file)
    if ending.results is not None:
        line = dataclasses.replace(result, recipe=named).as_dict() | dict(more or {})
        lines = lines_from(line, commit=commit(), date=f"{datetime.date.today()}")
        append(lines, ending.results, ending.results_name)
    return named, dataclasses.replace(result, recipe=named)


def made_by(held_out: Comparison, command: str, commit: str, calibration: Sequence[Job]) -> dict[str, Any]:
    """The [made_by] table: how the recipe was found, and what it measured on held-out prompts."""
    recipe = held_out.columns["recipe"]
    rival = held_out.columns.get("rival")
    table: dict[str, Any] = {
        "measured": True,
        "command": command,
        "commit": commit,
        "device": held_out.as_dict()["device"],
        "calibration": [f"{job.seed}: {job.prompt}" for job in calibration],
        "held_out": [f"{job.seed}: {job.prompt}" for job in held_out.jobs],
        "speedup": round(held_out.speedup(), 3),
        "psnr": round(recipe.mean("psnr") or 0, 2),
        "ssim": round(recipe.mean("ssim") or 0, 4),
    }
    for name, column in (("dense", held_out.columns["dense"]), ("recipe", recipe)):
        score = column.mean("faithfulness")
        if score is not None:
            table[f"faithfulness_{name}"] = round(score, 3)
    if rival is not None:
        table |= {"rival_steps": rival.steps, "rival_speedup": round(held_out.speedup("rival"), 3)}
        table["rival_psnr"] = round(rival.mean("psnr") or 0, 2)
    return table


def command_of(arguments: Sequence[str]) -> str:
    """The user's command without the places of its files."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in PLACES:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in PLACES)):
            kept.append(word)
    return shlex.join(["dit-accel", *kept])


def commit() -> str:
    """The commit of this source tree, or the version of an installed package."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or version_of("dit_accel") or "unknown"


def own_command() -> str:
    """The command that is running."""
    return command_of(sys.argv[1:])


def file_of(out: Path, model: str, name: str) -> Path:
    """OUT/MODEL/NAME.toml; of a model given by a path the last part of it."""
    local = Path(model).is_absolute() or model.startswith((".", "~"))
    return out / (Path(model).name if local else model) / f"{name}.toml"
