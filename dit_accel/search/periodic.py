"""A small search over periodic timelines: one span of blocks, cond computed every p-th step, uncond q-th.

Every candidate is a whole recipe, measured by real generations beside the dense pipeline
(`dit_accel.compare`); there is no proxy for speed or quality. The first `warm` and the last `rest` steps
compute everything. In between

    cond    computes at every `cond`-th step and is reused at the others,
    uncond  computes at every `uncond`-th of cond's computed steps and is derived from cond at the others,
            with the difference stored when both last computed.

Of the candidates as fast as a goal the one nearest to dense wins; a goal nobody reaches gets the fastest.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from dit_accel.compare import Comparison, Job, Options, compare
from dit_accel.loading import Model
from dit_accel.recipe import Recipe

GOALS = {"safe": 1.25, "balanced": 1.6, "fast": 2.2}  # whole-pipeline speedups


@dataclass(frozen=True)
class Period:
    """One candidate timeline."""

    warm: int  # steps that compute everything at the start
    rest: int  # and at the end
    cond: int  # cond computes every so many steps; 1 is always
    uncond: int  # uncond computes at every so many of those

    def letters(self, steps: int) -> tuple[str, str]:
        """(cond, uncond): C compute, r reuse, s derived from cond."""
        rows = [self._step(step, steps) for step in range(steps)]
        return "".join(c for c, _ in rows), "".join(u for _, u in rows)

    def work(self, steps: int) -> float:
        """The share of the span's visits that compute."""
        rows = "".join(self.letters(steps))
        return rows.count("C") / len(rows)

    def _step(self, step: int, steps: int) -> tuple[str, str]:
        since = step - self.warm
        if since < 0 or step >= steps - self.rest:
            return "C", "C"
        if (since + 1) % self.cond:
            return "r", "s"
        return "C", "s" if ((since + 1) // self.cond) % self.uncond else "C"


def periods(steps: int) -> list[Period]:
    """The candidates, most work first; those with the same letters once."""
    grid = product((2, 3, max(3, steps // 6)), (1, 2), (1, 2, 3), (1, 2, 3, 4))
    unique = {period.letters(steps): period for period in (Period(*each) for each in grid)}
    return sorted(unique.values(), key=lambda period: -period.work(steps))


def recipe_of(period: Period, model: Model, steps: int, blocks: int, gates: str, name: str) -> Recipe:
    """The candidate as a recipe for this model: one span over all blocks."""
    family = model.family
    assert family is not None
    cond, uncond = period.letters(steps)
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


def predicted_speedup(period: Period, steps: int, denoising: float) -> float:
    """Speedup if skipped visits were free; `denoising` is its share of the dense time."""
    return 1 / (1 - denoising * (1 - period.work(steps)))


def search(
    model: Model,
    jobs: Sequence[Job],
    arguments: dict[str, Any],
    steps: int,
    goals: dict[str, float],
    denoising: float,
    tell: Callable[[str], None],
    per_goal: int = 6,
    gates: Iterable[str] = ("current", "stored"),
) -> dict[str, tuple[Recipe, Comparison]]:
    """For each goal the best measured recipe on the calibration `jobs`, with its measurement."""
    blocks = len(model.pipe.transformer.get_submodule(model.family.blocks[0]))  # pyright: ignore
    found: dict[str, tuple[Recipe, Comparison]] = {}
    for goal, wanted in goals.items():
        near = [p for p in periods(steps) if 1.0 <= predicted_speedup(p, steps, denoising) / wanted <= 1.25]
        tried = [
            _measure(recipe_of(period, model, steps, blocks, kind, goal), model, jobs, arguments, tell)
            for period in near[:: max(1, len(near) // per_goal)]
            for kind in gates
        ]
        reached = [each for each in tried if each[1].speedup() >= wanted]
        if reached:
            found[goal] = max(reached, key=lambda each: each[1].columns["recipe"].mean("psnr") or 0)
        elif tried:
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
