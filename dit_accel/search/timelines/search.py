"""A small search over timelines of one span: which visits of which branch are skipped.

Dense runs of the calibration prompts (`trajectory`) tell which rows of letters cost least at an amount of
work (`skips`);
the best rows at several amounts are then measured by real generations beside the dense pipeline
(`dit_accel.compare`). Of those as fast as a goal the one nearest to dense wins; a goal nobody reaches gets
the fastest.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import api
from dit_accel.compare import Comparison, Job, Options, compare
from dit_accel.generate import generate
from dit_accel.loading import Model
from dit_accel.recipe import Recipe
from dit_accel.search.outcome import Ending, file_of, finish
from dit_accel.search.timelines.skips import Actions, choose, letters, predicted_error, work
from dit_accel.search.trajectory import Trajectory, calibrate, record

GOALS = {"safe": 1.25, "balanced": 1.6, "fast": 2.2}  # whole-pipeline speedups


def recipe_of(actions: Actions, model: Model, blocks: int, gates: str, name: str) -> Recipe:
    """The candidate as a recipe for this model: one span over all blocks."""
    family, steps = model.family, len(actions)
    assert family is not None
    cond, uncond = letters(actions)
    ages = {"max_age": steps}
    site = f"{family.blocks[0]}.0-{blocks - 1}"
    return Recipe.from_dict(
        {
            "schema": 1,
            "made_for": {"family": family.name, "model": model.name, "steps": steps},
            "choices": {
                "C": {"method": "compute"},
                "r": {"method": "reuse", "gates": gates, **ages},
                "s": {"method": "share_branch", "difference": True, **ages},
            },
            "timeline": {"cond": {site: cond}, "uncond": {site: uncond}},
        },
        name=name,
    )


def skips_for(speedup: float, steps: int, denoising: float) -> int:
    """Visits to skip for a whole-pipeline speedup if skipped visits were free; `denoising` is its share."""
    share = (1 - 1 / speedup) / denoising
    return min(2 * (steps - 1), max(0, math.ceil(2 * steps * share - 1e-9)))


def trajectories_of(
    model: Model, jobs: Sequence[Job], arguments: dict[str, Any], tell: Callable[[str], None]
) -> list[Trajectory]:
    """Dense runs of `jobs`, their weights calibrated by runs that skip one step of the whole span."""
    blocks = _blocks(model)
    found = []
    for job in jobs:
        run = record(model, job.prompt, job.seed, arguments)
        steps = len(run.weight)

        def skipped(step: int, job: Job = job, steps: int = steps) -> np.ndarray:
            actions = tuple(2 * (each == step) for each in range(steps))
            with api.accelerated(model.pipe, recipe_of(actions, model, blocks, "stored", "probe")):
                return generate(model, job.prompt, arguments, job.seed).frames

        found.append(calibrate(run, skipped))
        factors = found[-1].weight / run.weight
        tell(f"{job.prompt!r}: an error grows {factors.max():.2g} to {factors.min():.2g} times")
    return found


def _blocks(model: Model) -> int:
    return len(model.pipe.transformer.get_submodule(model.family.blocks[0]))  # pyright: ignore


def search(
    model: Model,
    trajectories: Sequence[Trajectory],
    jobs: Sequence[Job],
    arguments: dict[str, Any],
    goals: dict[str, float],
    denoising: float,
    tell: Callable[[str], None],
    slack: Iterable[float] = (1.03, 1.1),
    gates: Iterable[str] = ("current", "stored"),
) -> dict[str, tuple[Recipe, Comparison]]:
    """For each goal the best recipe measured on `jobs`, with its measurement.

    For each of `slack` the rows are chosen for that many times the goal, since skipping is not free.
    """
    steps = len(trajectories[0].weight)
    blocks = _blocks(model)
    found: dict[str, tuple[Recipe, Comparison]] = {}
    for goal, wanted in goals.items():
        amounts = sorted({skips_for(wanted * more, steps, denoising) for more in slack})
        tried = []
        for actions in (choose(trajectories, amount) for amount in amounts):
            error = predicted_error(trajectories, actions)
            tell(f"{goal}: work {work(actions):.3f}, predicted error {error:.4f}")
            for kind in gates if "r" in letters(actions)[0] else ("stored",):
                recipe = recipe_of(actions, model, blocks, kind, goal)
                tried.append(_measure(recipe, model, jobs, arguments, tell))
        reached = [each for each in tried if each[1].speedup() >= wanted]
        if reached:
            found[goal] = max(reached, key=lambda each: each[1].columns["recipe"].mean("psnr") or 0)
        else:
            found[goal] = max(tried, key=lambda each: each[1].speedup())
            tell(f"{goal}: no candidate reached {wanted}x; kept the fastest")
    return found


def _measure(
    recipe: Recipe, model: Model, jobs: Sequence[Job], arguments: dict[str, Any], tell: Callable[[str], None]
) -> tuple[Recipe, Comparison]:
    result = compare(model, recipe, jobs, arguments, Options(warm_up=False))
    rows = next(iter(recipe.timeline["cond"].values())), next(iter(recipe.timeline["uncond"].values()))
    gates = recipe.choices["r"].parameters["gates"]
    psnr = result.columns["recipe"].mean("psnr")
    tell(f"{recipe.name}: {rows[0]} {rows[1]} gates {gates}: {result.speedup():.2f}x, {psnr:.1f} dB")
    return recipe, result


def search_goals(
    model: Model,
    jobs: Sequence[Job],
    measured: int,
    arguments: dict[str, Any],
    goals: dict[str, float],
    tell: Callable[[str], None],
) -> dict[str, tuple[Recipe, Comparison]]:
    """`search` from dense runs of `jobs`, candidates measured on the first `measured` of them."""
    dense = compare(model, Recipe.neutral(), jobs[:1], arguments).columns["dense"].median_stages()
    share = dense["denoising"] / sum(dense.values())
    trajectories = trajectories_of(model, jobs, arguments, tell)
    return search(model, trajectories, jobs[:measured], arguments, goals, share, tell)


def write_recipes(
    model: Model,
    arguments: dict[str, Any],
    ending: Ending,
    goals: dict[str, float],
    out: Path,
    tell: Callable[[str], None],
    measured: int = 2,
) -> None:
    """Search, verify on held-out prompts, and write OUT/MODEL/GOAL.toml for each goal."""
    found = search_goals(model, ending.calibration, measured, arguments, goals, tell)
    for goal, (recipe, _) in found.items():
        named = dataclasses.replace(recipe, name=f"{model.name}/{goal}")
        file = file_of(out, model.name, goal)
        _, result = finish(model, named, arguments, file, ending)
        tell(f"{file}: {result.as_dict()['columns']}")
