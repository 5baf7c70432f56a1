"""The HarmoniCa search as a user asks for it: a router trained or given, a threshold, a budget."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.compare import Comparison, Options, Watch, compare
from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured
from dit_accel.search.harmonica.page import harmonica_page
from dit_accel.search.harmonica.table import picks, published_tau, tau_within
from dit_accel.search.harmonica.training import Settings, Training
from dit_accel.search.outcome import Ending, finish
from dit_accel.search.pursuit import MEASURED_JOBS, VERIFYING, Clock
from dit_accel.train.harmonica.router import LETTERS, Router

TRIES = 3  # compiled and measured, where a speedup is asked for


@dataclass(frozen=True)
class Found:
    """What a search ends with; `steps` the router was trained here, None: it was given."""

    recipe: Recipe
    router: Router
    tau: float
    steps: int | None


def check_caching_goal(settings: Settings, speedup: float | None, tau: float | None, given: bool) -> None:
    """BadUsage where a command line asks for what is no goal, or for two."""
    if speedup is not None and not speedup > 1:
        raise BadUsage(f"asked for --speedup {speedup:g}; it must be over 1. Ask for more.")
    if tau is not None and not 0 <= tau <= 1:
        raise BadUsage(f"asked for --tau {tau:g}; a score is from 0 to 1. Give one between them.")
    if tau is not None and speedup is not None and not settings.hard:
        raise BadUsage(
            f"asked for --tau {tau:g} and --speedup {speedup:g}; a speedup is reached by "
            "tau. Give one of them."
        )
    if settings.hard and speedup is None and not given:
        raise BadUsage(
            f"asked for {settings.gates} gates, which are trained for a budget; no --speedup was given. Give "
            "one, as --speedup 1.5, or use --gates published."
        )


class HarmoniCaPursuit:
    """One run of the command."""

    def __init__(
        self, training: Training, tau: float | None, clock: Clock, watch: Watch, tell: Callable[[str], None],
        held_out: int, weights: Path | None = None,
    ):  # fmt: skip
        self.training, self.tau, self.clock, self.watch = training, tau, clock, watch
        self.tell, self.held_out, self.weights = tell, held_out, weights
        self.goal = None if training.speedup is None else Goal("speedup", training.speedup)

    def find(self) -> Found:
        """Train a router, or take the one given; compile it."""
        training = self.training
        self._reserve()
        if self.weights is not None:
            router, done = training.load(self.weights), None
        else:
            self.watch.generation(0, 1, "training the router")
            router, done = training.train(self.clock.ended, self.watch.step)
            if done < training.settings.steps:
                self.tell(unfinished(done, training.settings.steps))
        router = router.cpu()
        if self.goal is not None and self.tau is None:
            tau = self._aim(router, self.goal)
        else:
            tau = published_tau(router) if self.tau is None else self.tau
        return Found(training.recipe(router, tau), router, tau, done)

    def _reserve(self) -> None:
        """Foresee what verification takes, where there is a budget."""
        if self.clock.minutes is None:
            return
        began = time.monotonic()
        prices = self.training.prices()
        generation = min(time.monotonic() - began, prices.whole) or prices.whole
        self.clock.reserve = generation * (1 + VERIFYING * self.held_out)
        if self.clock.ended():
            raise BadUsage(
                f"asked to search within {self.clock.minutes:g} minutes; to verify the recipe alone takes "
                f"about {self.clock.reserve / 60:.1f}. Give more --minutes, or a smaller --held-out."
            )

    def _aim(self, router: Router, goal: Goal) -> float:
        """The threshold whose measured speedup is the goal's: aimed higher by what a try fell short."""
        training, aimed = self.training, goal.value
        tried: dict[float, Measured] = {}
        for _ in range(TRIES):
            tau = tau_within(router, training.costs(min(aimed, 0.999 * training.prices().most)))
            if tau in tried:
                break
            tried[tau] = self._measure(router, tau)
            if goal.reached(tried[tau]) or self.clock.ended():
                break
            aimed *= goal.value / tried[tau]["speedup"]
        best = goal.best(tried)
        if not goal.reached(tried[best]):
            self.tell(
                f"no threshold reached --speedup {goal.value:g}; the nearest has {tried[best]['speedup']:.2f}"
            )
        return best

    def _measure(self, router: Router, tau: float) -> Measured:
        training = self.training
        recipe = training.recipe(router, tau)
        result = compare(
            training.model, recipe, training.jobs[:MEASURED_JOBS], training.arguments, Options(), self.watch
        )
        found = {"speedup": result.speedup(), "psnr": result.columns["recipe"].mean("psnr") or 0.0}
        self.tell(f"tau {tau:.4f}: {found['speedup']:.2f}x, {found['psnr']:.1f} dB")
        return found

    def close(self, found: Found, name: str, file: Path, ending: Ending, html: Path) -> Comparison:
        """Verify on held-out prompts, write the recipe and the page."""
        training, settings = self.training, self.training.settings
        more: dict[str, Any] = {
            "method": "harmonica",
            "gates": settings.gates,
            "branches": settings.branches,
            "tau": found.tau,
            "search_minutes": self.clock.spent_minutes(),
        }
        if found.steps is None:
            more["router"] = "given"
        else:
            more |= {"trained_steps": found.steps, "micro_batches": settings.micro_batches}
            more |= {
                "lr": settings.lr,
                "proxy": settings.rules.proxy,
                "regenerate": settings.rules.regenerate,
            }
            if not settings.hard:
                more["beta"] = found.router.log_price.exp().item()
            if found.steps < settings.steps:
                more["stopped"] = unfinished(found.steps, settings.steps)
        more |= {f"share_{letter}": share for letter, share in shares_of(found.router, found.tau).items()}
        named = dataclasses.replace(found.recipe, name=name)
        _, result = finish(training.model, named, training.arguments, file, ending, self.watch, more)
        trained_in = training.folder if found.steps is not None else None
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(harmonica_page(result, found.router, found.tau, trained_in), encoding="utf-8")
        return result


def shares_of(router: Router, tau: float) -> dict[str, float]:
    """Of all sublayers and steps the share of each letter."""
    found = picks(router, tau)
    count = max(2, router.choices)
    return {LETTERS[pick]: round(float((found == pick).mean()), 3) for pick in range(count)}


def unfinished(done: int, steps: int) -> str:
    """How far a training came that its budget ended."""
    return (
        f"the budget ended after step {done} of {steps} of the training; the router is that of that step. "
        "The same command again goes on from there."
    )
