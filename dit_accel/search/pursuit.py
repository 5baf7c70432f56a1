"""A search as a user asks for it: a goal, a budget in minutes, a state file, progress."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.compare import Comparison, Options, Watch, compare
from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured, pursue
from dit_accel.search.method import Decided, Search
from dit_accel.search.outcome import Ending, finish
from dit_accel.search.page import write_page
from dit_accel.search.saved import Saved

MEASURED_JOBS = 2  # calibration prompts on which a candidate's speed and quality are measured
VERIFYING = 3.0  # dense generations that a held-out prompt takes: dense, recipe and rival


@dataclass
class Clock:
    """A budget. `reserve` are the seconds that verification will take of it."""

    minutes: float | None = None
    reserve: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise BadUsage(
                f"asked to search within {self.minutes:g} minutes; a search takes some. "
                "Give --minutes above 0, or leave it out."
            )

    def left(self) -> float:
        """Seconds that are left besides those of verification."""
        if self.minutes is None:
            return math.inf
        return 60 * self.minutes - self.reserve - (time.monotonic() - self.began)

    def ended(self) -> bool:
        """Whether only verification still fits."""
        return self.left() < 0

    def spent_minutes(self) -> float:
        """What the search has taken so far, for its recipe."""
        return round((time.monotonic() - self.began) / 60, 2)


@dataclass(frozen=True)
class Found:
    """What a pursuit ends with."""

    recipe: Recipe
    delta: float
    decisions: Decided
    tried: Mapping[float, Measured]


class Pursuit:
    """One run of the command. Raises BadUsage before a generation where the budget cannot be kept."""

    def __init__(
        self, search: Search, goal: Goal, state: Path, clock: Clock, watch: Watch,
        tell: Callable[[str], None], tries: int = 5, held_out: int = 2,
    ):  # fmt: skip
        self.search, self.goal, self.clock, self.watch, self.tell = search, goal, clock, watch, tell
        self.tries, self.held_out = tries, held_out
        self.saved = Saved(state, search.asked(), search.decided)
        self.searches = 0

    def find(self) -> Found:
        """Search, with several deltas where the goal is not one."""
        delta, tried = pursue(self.goal, self._measure, self.clock.ended, self.search.first_delta, self.tries)
        decisions = self.saved.decisions(delta)
        if self.goal.kind != "delta" and not self.goal.reached(tried[delta]):
            self.tell(
                f"no recipe reached --{self.goal.kind} {self.goal.value:g}; the nearest has "
                f"{tried[delta][self.goal.kind]:.2f}"
            )
        if not decisions.finished:
            self.tell(unfinished(decisions, self.search))
        for note in decisions.notes:
            self.tell(note)
        return Found(self.search.recipe_of(decisions), delta, decisions, tried)

    def _measure(self, delta: float) -> Measured:
        """Search with a delta; where the goal asks for it, measure what came of it."""
        decisions, key = self.saved.decisions(delta), repr(delta)
        most = 1 if self.goal.kind == "delta" else self.tries
        self.watch.generation(self.searches, most, f"search, delta {delta:g}")
        self.searches += 1
        began = time.monotonic()

        def told(done: int, total: int) -> None:
            if not self.clock.reserve:
                self._reserve(time.monotonic() - began)
            self.watch.step(done, total)

        recipe = self.search.search(
            delta, decisions, self.clock.ended, lambda: self.saved.save(now=False), told
        )
        self.saved.save()
        if self.goal.kind == "delta":
            return {}
        if key not in self.saved.measured or not decisions.finished:
            jobs = self.search.jobs[:MEASURED_JOBS]
            result = compare(self.search.model, recipe, jobs, self.search.arguments, Options())
            psnr = result.columns["recipe"].mean("psnr") or 0.0
            self.saved.measured[key] = {"speedup": result.speedup(), "psnr": psnr}
            self.saved.save()
        measured = self.saved.measured[key]
        self.tell(f"delta {delta:g}: {measured['speedup']:.2f}x, {measured['psnr']:.1f} dB")
        return measured

    def _reserve(self, first_step: float) -> None:
        """Foresee what verification takes, from the first step of all calibration prompts together."""
        generation = first_step / len(self.search.jobs) * len(self.search.levels)
        self.clock.reserve = generation * (1 + VERIFYING * self.held_out)
        if self.clock.ended():
            raise BadUsage(
                f"asked to search within {self.clock.minutes:g} minutes; to verify the recipe alone takes "
                f"about {self.clock.reserve / 60:.1f}. Give more --minutes, or a smaller --held-out."
            )

    def close(self, found: Found, name: str, file: Path, ending: Ending, html: Path | None) -> Comparison:
        """Verify on held-out prompts, write the recipe and the page."""
        search, recipe = self.search, dataclasses.replace(found.recipe, name=name)
        more: dict[str, Any] = {
            "method": search.name,
            "delta": found.delta,
            **search.settings,
            "search_minutes": self.clock.spent_minutes(),
        }
        if not found.decisions.finished:
            more["stopped"] = unfinished(found.decisions, search)
        _, result = finish(search.model, recipe, search.arguments, file, ending, self.watch, more)
        if html is not None:
            write_page(html, result, search, search.picture(found.delta, found.decisions))
        return result


def unfinished(decisions: Decided, search: Search) -> str:
    """How far a search came that its budget ended."""
    return (
        f"the budget ended at step {max(0, decisions.steps - 1)} of {len(search.levels)}: what was not "
        "decided stays full. The same command again goes on from there."
    )
