"""The plan search: measure once, then plan, generate, and repair until the goal is met.

Source: ours. Sensitivity-weighted projected errors in place of an equal threshold for every layer and step
(DiTFastAttn, DiTFastAttnV2), one price of a second for the whole pipeline, and errors scaled by real runs.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dit_accel import api
from dit_accel.compare import Job, Options, Watch, compare
from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured
from dit_accel.search.plan.candidates import menu
from dit_accel.search.plan.planning import PipelinePlan, Planner
from dit_accel.search.plan.repair import Scales, blame, ranges_of
from dit_accel.search.plan.segments import LayerPlan, LayerTable
from dit_accel.search.plan.state import Arrays, State
from dit_accel.search.plan.storing import bytes_of
from dit_accel.search.plan.survey import Survey
from dit_accel.search.plan.tables import layer_table
from dit_accel.search.plan.writing import recipe_of
from dit_accel.search.subject import Subject

AGES = 4  # the oldest value that a head or a module may answer with, in steps
SLOWER = 0.9, 1.25  # than foretold: what is farther off is another program that ran at the time
CLOSE = 1.03  # over the speedup asked for: what runs of one plan differ by
NEAR, NEAR_DB = 1.1, 2.0  # over the goal: what is farther is aimed again


@dataclass(frozen=True)
class Tried:
    """A plan that was generated with."""

    recipe: Recipe
    plan: PipelinePlan
    measured: Measured


@dataclass
class PlanSearch:
    """One search. `left` tells the seconds that remain besides those of verification."""

    subject: Subject
    goal: Goal
    state: State
    watch: Watch
    tell: Callable[[str], None]
    left: Callable[[], float]
    timed: Callable[[float], None] = lambda seconds: None  # hears what a dense generation takes
    memory_gb: float | None = None
    ages: int = AGES
    tries: int = 6
    tried: list[Tried] = field(default_factory=list[Tried])
    frames: dict[Job, np.ndarray] = field(default_factory=dict)
    kernel_alone: float = 1.0  # the speedup with every head full, through a backend where that is faster

    def __post_init__(self) -> None:
        self.menu = menu(self.subject.grid, self.subject.text)
        self.layers = self.subject.all_attention()
        self.survey = Survey(self.subject, self.menu, self.ages, self.state, self.watch, self._fits)

    def stored_bytes(self) -> int:
        """What a search keeps at most: far parts of every near set, and some rows of outputs, by age."""
        subject, tails = self.subject, sum(each.method == "tail" for each in self.menu)
        wide = max(subject.width(key) for key in subject.layers())
        rows = subject.stored_rows // len(subject.jobs)  # one prompt at a time
        return len(subject.sites) * (self.ages + 1) * rows * (tails + 1) * wide * subject.item_bytes

    # ---- what is measured once

    def measure(self) -> None:
        """All measurements that the plans are made of; those of an interrupted search are kept."""
        self.survey.take_seconds()
        self.timed(self.survey.seconds.whole)
        self.survey.take_errors()
        if len(self.survey.noted) < len(self.subject.jobs):
            found = f"{len(self.survey.noted)} of {len(self.subject.jobs)} prompts"
            self.tell(f"the budget ended: the plan is made of {found}")
        self.kernel_alone = float(self.state.once("exact", self._exact)["speedup"][0])
        self.tell(f"the dense kernel alone: {self.kernel_alone:.2f}x")
        for reason in self.survey.refused:
            self.tell(f"left out of the menu: {reason}")

    def _fits(self, prompts: int, seconds: float) -> bool:
        return self.left() > seconds + self._trying(prompts, self.survey.seconds.whole)

    def _exact(self) -> Arrays:
        """What the pipeline gains with everything full, through a backend where that is faster."""
        if not self.survey.backend:
            return {"speedup": np.ones(1)}
        subject = self.subject
        steps = len(subject.levels)
        plans = {key: LayerPlan.full(steps, subject.attention(key).heads) for key in self.layers}
        jobs, quiet = subject.jobs[:1], Options(warm_up=False)
        result = compare(subject.model, self.recipe(plans), jobs, subject.arguments, quiet)
        return {"speedup": np.array([result.speedup()])}

    # ---- plans

    def planner(self, scales: Scales) -> Planner:
        """A planner whose errors are scaled."""
        tables: dict[Key, LayerTable] = {}
        for key in self.layers:
            noted = [each[key] for each in self.survey.noted]
            weights = self.survey.weights * scales.steps * scales.layers[key]
            tables[key] = layer_table(
                noted, weights, self.survey.seconds.modules[key], key in self.survey.backend
            )
        limit = math.inf if self.memory_gb is None else self.memory_gb * 2**30
        return Planner(tables, self.survey.seconds.rest, limit, self._bytes)

    def _bytes(self, key: Key, plan: LayerPlan) -> int:
        subject = self.subject
        heads = subject.attention(key).heads
        rows = subject.stored_rows // (2 * len(subject.jobs))  # of one prompt on one branch
        return bytes_of(plan, rows, subject.width(key) // heads, subject.item_bytes)

    def recipe(self, layers: Mapping[Key, LayerPlan], name: str = "plan") -> Recipe:
        """The recipe of some layers' plans."""
        subject = self.subject
        return recipe_of(
            layers, subject.levels, self.ages, self.survey.backend, subject.made_for, name, self.memory_gb
        )

    # ---- the search

    def find(self) -> Tried:
        """Measure, plan, generate, repair; the best of what was generated.

        A plan that misses the goal is aimed again, by what was measured; one that meets it is repaired, and
        the first repair that is no better ends the search.
        """
        self.measure()
        scales, repaired = Scales.even(len(self.subject.levels), self.layers), None
        for number in range(self.tries):
            plan = self._aim(self.planner(repaired or scales))
            self.tried.append(self._try(plan, number))
            if repaired is not None:
                if self.best() is not self.tried[-1]:
                    self.tell("the repaired plan is no better: it is left")
                    break
                scales, repaired = repaired, None
            again = self._trying(len(self.survey.noted), plan.seconds)
            if self.goal.kind == "delta" or number + 1 == self.tries or self.left() < again:
                break
            if self._meets(self.tried[-1].measured):
                if not plan.error or self.left() < again + self._blaming() * plan.seconds:
                    break
                repaired = scales.times(self._repair(plan, number))
        return self.best()

    def _meets(self, measured: Measured) -> bool:
        """Whether the goal is reached, and not by so much that a slower or a nearer plan serves it better."""
        most = {"speedup": self.goal.value * NEAR, "psnr": self.goal.value + NEAR_DB}[self.goal.kind]
        return self.goal.reached(measured) and measured[self.goal.kind] <= most

    def _blaming(self) -> int:
        """Generations that a repair takes."""
        return len(ranges_of(len(self.subject.levels))) + len(self.layers) + 1

    def _repair(self, plan: PipelinePlan, number: int) -> Scales:
        self.watch.generation(number, self.tries, "where the error comes from")
        # another prompt each time: what one of them forgives the next may not
        job = self.subject.jobs[number % len(self.survey.noted)]
        return blame(plan, len(self.subject.levels), functools.partial(self._error, job))

    def _trying(self, prompts: int, seconds: float) -> float:
        """What it takes to generate with a plan of so many seconds, beside dense, with as much to warm up."""
        return (prompts + 1) * (self.survey.seconds.whole + seconds)

    def _aim(self, planner: Planner) -> PipelinePlan:
        """The plan that should reach the goal, by what earlier tries came to."""
        if self.goal.kind == "speedup":
            # how many times slower generations were than foretold
            ratios = [
                self.survey.seconds.whole / each.measured["speedup"] / each.plan.seconds
                for each in self.tried
            ]
            slower = float(np.clip(np.median(ratios), *SLOWER)) if ratios else 1.0
            return planner.within_seconds(self.survey.seconds.whole / (self.goal.value * CLOSE) / slower)
        if self.goal.kind == "delta":
            return planner.within_error(self.goal.value * self._power())
        wanted = self._mse_sum(self.goal.value)
        if self.tried:  # the predicted error that gave the error found, brought to what is wanted
            last = self.tried[-1]
            wanted *= max(last.plan.error, 1e-12) / self._mse_sum(last.measured["psnr"])
        return planner.within_error(wanted)

    def _power(self) -> float:
        return float(np.square(self._dense_frames(self.subject.jobs[0]).astype(np.float64)).sum())

    def _mse_sum(self, psnr: float) -> float:
        """The squared error of all frames at so many dB."""
        return 10 ** (-psnr / 10) * self._dense_frames(self.subject.jobs[0]).size

    def _dense_frames(self, job: Job) -> np.ndarray:
        if job not in self.frames:
            sample = generate(self.subject.model, job.prompt, self.subject.arguments, job.seed)
            self.frames[job] = sample.frames
        return self.frames[job]

    def _error(self, job: Job, layers: Mapping[Key, LayerPlan]) -> float:
        """The squared error of a prompt's frames under some layers' plans."""
        dense = self._dense_frames(job)
        with api.accelerated(self.subject.model.pipe, self.recipe(layers)):
            frames = generate(self.subject.model, job.prompt, self.subject.arguments, job.seed).frames
        return float(np.square(frames.astype(np.float64) - dense).sum())

    def _try(self, plan: PipelinePlan, number: int) -> Tried:
        recipe = self.recipe(plan.layers)
        self.watch.generation(number, self.tries, "a plan, beside the dense pipeline")
        jobs, warm_up = self.subject.jobs, not number
        result = compare(self.subject.model, recipe, jobs, self.subject.arguments, Options(warm_up=warm_up))
        psnr = result.columns["recipe"].mean("psnr") or 0.0
        measured = {"speedup": result.speedup(), "psnr": psnr}
        predicted = -10 * math.log10(max(plan.error, 1e-12) / self._mse_sum(0.0))
        self.tell(
            f"plan {number + 1}: {measured['speedup']:.2f}x, {psnr:.1f} dB "
            f"(predicted {self.survey.seconds.whole / plan.seconds:.2f}x, {predicted:.1f} dB)"
        )
        return Tried(recipe, plan, measured)

    def best(self) -> Tried:
        """Of what was generated the one that the goal prefers."""
        if self.goal.kind == "delta":
            return self.tried[-1]
        tried = {float(number): each.measured for number, each in enumerate(self.tried)}
        return self.tried[int(self.goal.best(tried))]
