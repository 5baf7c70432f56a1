"""The search of MoA's rules: errors at the sizes of calibration, one assignment for all of them, a choice.

Source: MoA, Fu et al. 2024, arXiv:2406.14909. There a first-order estimate of the loss by masked attention
weights is profiled at a few lengths; the loss of a denoiser against its own output has no first order, so
errors here are those of the plan search (`heads.survey`): projected, weighed by what they come to in the
frames. Rules hold for a head over `interval` steps: noise levels are to a denoiser what depth is to a text.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_accel.block_heads import Rules
from dit_accel.compare import Options, Watch, compare
from dit_accel.errors import BadUsage
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured
from dit_accel.search.moa.rules import elastic_rules, menu_at
from dit_accel.search.moa.solving import foretold, fronts
from dit_accel.search.moa.writing import Assigned, recipe_of
from dit_accel.search.plan.state import State
from dit_accel.search.plan.survey import Survey
from dit_accel.search.subject import Subject

INTERVAL = 5  # steps between two decisions
TRIES = 5  # bounds that a goal is looked for with
NARROW = 0.03  # of the work: bounds nearer than that give the same speed


@dataclass(frozen=True)
class Tried:
    """An assignment that was generated with, at the size where it is chosen."""

    recipe: Recipe
    assigned: Assigned
    bound: float
    foretold: Sequence[float]  # squared error of the frames at each calibrated size
    measured: Measured


@dataclass
class ElasticSearch:
    """One search: `calibrated` are subjects at some sizes, `target` the one at which a solution is chosen."""

    calibrated: Sequence[Subject]
    target: Subject
    states: Sequence[State]
    watch: Watch
    tell: Callable[[str], None]
    left: Callable[[], float]
    goal: Goal | None = None  # a speedup or a PSNR at the target; else `bound` is given
    bound: float = 0.6  # of the attention's work, at every size
    full: str = "model"
    interval: int = INTERVAL
    timed: Callable[[float], None] = lambda seconds: None  # hears what a dense generation takes
    tried: list[Tried] = field(default_factory=list[Tried])

    def __post_init__(self) -> None:
        self.rules: list[Rules] = elastic_rules([each.grid for each in self.calibrated])
        self.menus = [menu_at(self.rules, each.grid, each.text) for each in self.calibrated]
        self.surveys = [
            Survey(subject, menu, 1, state, self.watch, lambda prompts, seconds: self.left() > 2 * seconds)
            for subject, (menu, _), state in zip(self.calibrated, self.menus, self.states, strict=True)
        ]

    @property
    def starts(self) -> list[int]:
        """The first step of every interval."""
        return list(range(0, len(self.target.levels), self.interval))

    # ---- what is measured once

    def measure(self) -> None:
        """Errors of every rule at every calibrated size; what an interrupted search has measured is kept."""
        for survey in self.surveys:
            survey.take_seconds()
            self.timed(self.dense_seconds)
            survey.take_errors()
            for reason in survey.refused:
                self.tell(f"left out at {survey.subject.grid}: {reason}")

    @property
    def dense_seconds(self) -> float:
        """What a dense generation should take at the target, by the first calibrated size."""
        longer = self.target.stored_rows / self.calibrated[0].stored_rows
        return self.surveys[0].seconds.whole * longer

    @functools.cached_property
    def units(self) -> list[tuple[Key, int, int]]:
        """(layer, interval, head): who takes a rule."""
        return [
            (key, interval, head)
            for key in self.target.layers()
            for interval in range(len(self.starts))
            for head in range(self.target.attention(key).heads)
        ]

    @functools.cached_property
    def weighed(self) -> list[dict[Key, np.ndarray]]:
        """[size][layer] [M, T, H]: errors in the frames of what is scored there, the mean over prompts.

        Infinite where nothing was scored: what was refused, and steps that another denoiser runs.
        """
        return [
            {
                key: np.stack(
                    [
                        np.mean([n[key].pair[each] * w[:, None] for n, w in scored], axis=0)
                        for each in survey.menu
                    ]
                )
                for key in self.target.layers()
            }
            for survey in self.surveys
            for scored in [list(zip(survey.noted, survey.weights, strict=True))]
        ]

    def ran(self, key: Key) -> np.ndarray:
        """[T]: whether a layer runs at a step."""
        scored: np.ndarray = np.isfinite(self.weighed[0][key])
        return np.asarray(scored.any(axis=(0, 2)))

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """[U]: the part of all steps and heads that a unit is."""
        steps = {
            key: np.add.reduceat(self.ran(key).astype(float), self.starts) for key in self.target.layers()
        }
        taken = np.array([steps[key][interval] for key, interval, _ in self.units])
        return taken / taken.sum()

    @functools.cached_property
    def errors(self) -> np.ndarray:
        """[S, U, R + 1]: what each choice of a unit adds to the squared error of the frames; 0 is full."""
        found = np.zeros((len(self.surveys), len(self.units), len(self.rules) + 1))
        for size, (_, places) in enumerate(self.menus):
            for key, scored in self.weighed[size].items():
                of_steps = np.where(self.ran(key)[:, None], scored, 0.0)
                by_interval = np.add.reduceat(of_steps, self.starts, axis=1)
                rows = [number for number, (own, *_) in enumerate(self.units) if own == key]
                for rule, place in enumerate(places, 1):
                    found[size, rows, rule] = by_interval[place].ravel()  # intervals, and heads in them
        return found

    @property
    def work(self) -> np.ndarray:
        """[S, R + 1]: the share of all pairs that each choice attends at each size."""
        return np.array([[1.0, *(menu[place].density for place in places)] for menu, places in self.menus])

    # ---- assignments

    def solutions(self, bound: float) -> list[tuple[Assigned, Sequence[float]]]:
        """What keeps at most `bound` of the work at every size, with the foretold errors there."""
        found: list[tuple[Assigned, Sequence[float]]] = []
        for chosen in fronts(self.errors, self.work, self.shares, bound):
            assigned: dict[Key, list[list[Rules | None]]] = {}
            for (key, interval, _), choice in zip(self.units, chosen, strict=True):
                rows = assigned.setdefault(key, [[] for _ in self.starts])
                rows[interval].append(self.rules[choice - 1] if choice else None)
            found.append((assigned, foretold(self.errors, chosen).tolist()))
        return found

    def recipe(self, assigned: Mapping[Key, Sequence[Sequence[Rules | None]]], name: str = "moa") -> Recipe:
        """The recipe of an assignment: for any size, as its extents are rules."""
        return recipe_of(assigned, self.starts, self.target, self.full, name)

    # ---- the search

    def find(self) -> Tried:
        """Measure, then look for the bound that the goal needs; of its solutions the best at the target."""
        self.measure()
        low, high, bound = 0.0, 1.0, self.bound
        for _ in range(TRIES if self.goal else 1):
            try:
                solutions = self.solutions(bound)
            except BadUsage:
                if self.goal is None or not self.tried:
                    raise
                low = bound  # no rules keep so little
            else:
                first = self._try(bound, *solutions[0])
                if self.goal is None or self._out_of_time():
                    break
                low, high = (low, bound) if self.goal.too_small(first.measured) else (bound, high)
            if high - low < NARROW:
                break
            bound = (low + high) / 2
        best = self.best()
        for assigned, errors in self.solutions(best.bound)[1:]:
            if self._out_of_time():
                break
            self._try(best.bound, assigned, errors)
        return self.best()

    def _out_of_time(self) -> bool:
        return self.left() < 2 * self.dense_seconds * (len(self.target.jobs) + 1)

    def _try(self, bound: float, assigned: Assigned, errors: Sequence[float]) -> Tried:
        recipe, warm_up = self.recipe(assigned), not self.tried
        self.watch.generation(len(self.tried), TRIES + 2, f"rules that keep {bound:.0%}, at the unseen size")
        target = self.target
        result = compare(target.model, recipe, target.jobs, target.arguments, Options(warm_up=warm_up))
        psnr = result.columns["recipe"].mean("psnr") or 0.0
        measured = {"speedup": result.speedup(), "psnr": psnr}
        self.tried.append(Tried(recipe, assigned, bound, errors, measured))
        kept = result.report.attention_kept if result.report else None
        self.tell(
            f"at most {bound:.0%} of the work at every size: {measured['speedup']:.2f}x, {psnr:.1f} dB"
            + (f", {kept:.0%} kept at {target.grid}" if kept is not None else "")
        )
        return self.tried[-1]

    def best(self) -> Tried:
        """Of what was generated the one that the goal prefers; without one the nearest to dense."""
        if self.goal is None:
            return max(self.tried, key=lambda each: each.measured["psnr"])
        tried = {float(number): each.measured for number, each in enumerate(self.tried)}
        return self.tried[int(self.goal.best(tried))]

    def stored_bytes(self) -> int:
        """What a search keeps at most: the last output of every layer at the greatest size."""
        rows = max(each.stored_rows // len(each.jobs) for each in self.calibrated)
        widths = [self.target.width(key) for key in self.target.layers()]
        return math.ceil(rows * sum(widths) * self.target.item_bytes)
