"""The VORTA search as a user asks for it: routers trained or given, a threshold for a goal, a budget."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.compare import Comparison, Options, Watch, compare
from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal, Measured
from dit_accel.search.outcome import Ending, finish
from dit_accel.search.pursuit import MEASURED_JOBS, VERIFYING, Clock
from dit_accel.search.vorta.page import vorta_page
from dit_accel.search.vorta.routing import Routing
from dit_accel.search.vorta.table import letters_of, pick_tau, taus
from dit_accel.train.vorta.branches import LETTERS
from dit_accel.train.vorta.router import BRANCHES


@dataclass(frozen=True)
class Found:
    """What a pursuit ends with; `steps` the routers were trained here, None: they were given."""

    recipe: Recipe
    table: Mapping[str, np.ndarray]
    tau: float | None
    steps: int | None


def check_routing_goal(speedup: float | None, psnr: float | None, tau: float | None) -> Goal | None:
    """The goal of a command line; None where the routers alone decide, or a tau is given."""
    given = {"speedup": speedup, "psnr": psnr, "tau": tau}
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise BadUsage(
            f"asked to search by VORTA for {' and '.join(f'--{name} {given[name]:g}' for name in asked)}; a "
            "goal is reached by tau. Give one of them, or none: then the routers alone decide."
        )
    for name, value, least in (("speedup", speedup, 1.0), ("psnr", psnr, 0.0)):
        if value is not None and not value > least:
            raise BadUsage(f"asked for --{name} {value:g}; it must be over {least:g}. Ask for more.")
    if speedup is not None:
        return Goal("speedup", speedup)
    return None if psnr is None else Goal("psnr", psnr)


class VortaPursuit:
    """One run of the command."""

    def __init__(
        self, routing: Routing, goal: Goal | None, tau: float | None, clock: Clock, watch: Watch,
        tell: Callable[[str], None], held_out: int, weights: Path | None = None,
    ):  # fmt: skip
        self.routing, self.goal, self.tau, self.clock = routing, goal, tau, clock
        self.watch, self.tell, self.held_out, self.weights = watch, tell, held_out, weights

    def find(self) -> Found:
        """Train routers, or take those given; compile them."""
        routing = self.routing
        self._prepare()
        costs = routing.costs()
        self.tell(f"seconds of the branches, as shares of full: coreset {costs[1]:.2f}, tile {costs[2]:.2f}")
        if self.weights is not None:
            routers, done = routing.load(self.weights), None
        else:
            self.watch.generation(len(routing.jobs), len(routing.jobs) + 1, "training the routers")
            routers, done = routing.train(self.clock.ended, self.watch.step)
            if done < routing.settings.steps:
                self.tell(unfinished(done, routing.settings.steps))
        table = routing.table(routers)
        tau = self.tau if self.goal is None else self._pick(self.goal, table, done)
        return Found(routing.recipe(table, tau), table, tau, done)

    def _prepare(self) -> None:
        """Samples; the first tells what verification will take."""
        routing, number, began = self.routing, 0, time.monotonic()

        def told(done: int, total: int) -> None:
            nonlocal number
            if done == 1:
                self.watch.generation(number, len(routing.jobs) + 1, "latents to train on")
            number += done == total
            self.watch.step(done, total)

        if self.weights is not None:
            routing.look()
            return
        routing.prepare(told)
        if number:
            routing.keep("generation_seconds", (time.monotonic() - began) / number)
        generation = routing.kept.get("generation_seconds", 0.0)
        self.clock.reserve = generation * (1 + VERIFYING * self.held_out)
        if self.clock.ended():
            raise BadUsage(
                f"asked to search within {self.clock.minutes:g} minutes; the latents to train on are made, "
                f"and to verify the recipe takes about {self.clock.reserve / 60:.1f}. Give the same command "
                "with more --minutes, which goes on from here, or a smaller --held-out."
            )

    def _pick(self, goal: Goal, table: Mapping[str, np.ndarray], done: int | None) -> float | None:
        routing = self.routing

        def measure(tau: float | None) -> Measured:
            key = f"measured, tau {tau} after {done} steps"
            if key not in routing.kept:
                jobs = routing.jobs[:MEASURED_JOBS]
                recipe = routing.recipe(table, tau)
                result = compare(routing.model, recipe, jobs, routing.arguments, Options(), self.watch)
                psnr = result.columns["recipe"].mean("psnr") or 0.0
                routing.keep(key, {"speedup": result.speedup(), "psnr": psnr})
            found = routing.kept[key]
            self.tell(
                f"tau {'none' if tau is None else tau}: {found['speedup']:.2f}x, {found['psnr']:.1f} dB"
            )
            return found

        tau, tried = pick_tau(goal, taus(table), measure, self.clock.ended)
        if not goal.reached(tried[tau]):
            self.tell(
                f"no threshold reached --{goal.kind} {goal.value:g}; the nearest has "
                f"{tried[tau][goal.kind]:.2f}"
            )
        return tau

    def close(self, found: Found, name: str, file: Path, ending: Ending, html: Path) -> Comparison:
        """Verify on held-out prompts, write the recipe and the page."""
        routing, settings = self.routing, self.routing.settings
        more: dict[str, Any] = {"method": "vorta", "coreset": settings.coreset}
        if found.steps is None:
            more["routers"] = "given"
        else:
            more |= {"price": settings.weights.priced, "trained_steps": found.steps}
            more |= {"micro_batches": settings.micro_batches, "temperature": settings.weights.temperature}
            if found.steps < settings.steps:
                more["stopped"] = unfinished(found.steps, settings.steps)
        if found.tau is not None:
            more["tau"] = found.tau
        more |= {f"share_{letter}": share for letter, share in shares_of(found.table, found.tau).items()}
        named = dataclasses.replace(found.recipe, name=name)
        _, result = finish(routing.model, named, routing.arguments, file, ending, self.watch, more)
        trained_in = routing.folder if found.steps is not None else None
        page = vorta_page(result, found.table, found.tau, routing.costs(), trained_in)
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page, encoding="utf-8")
        return result


def shares_of(table: Mapping[str, np.ndarray], tau: float | None) -> dict[str, float]:
    """Of all heads and steps the share of each letter."""
    picks = np.concatenate([letters_of(scores, tau).ravel() for scores in table.values()])
    return {LETTERS[branch]: round(float((picks == branch).mean()), 3) for branch in range(BRANCHES)}


def unfinished(done: int, steps: int) -> str:
    """How far a training came that its budget ended."""
    return (
        f"the budget ended after step {done} of {steps} of the training; the routers are those of that step. "
        "The same command again goes on from there."
    )
