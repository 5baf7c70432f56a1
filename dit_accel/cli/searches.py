"""One function for each search: opens it, runs it under progress bars, says where its files are."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.cli import asked
from dit_accel.cli.screen import Bars, say, screen
from dit_accel.errors import BadUsage

if TYPE_CHECKING:
    from collections.abc import Callable

    from dit_accel.compare import Comparison
    from dit_accel.loading import Model
    from dit_accel.search.method import Search
    from dit_accel.search.outcome import Ending
    from dit_accel.search.pursuit import Clock


@dataclass(frozen=True)
class Given:
    """What a command line asks of a search; `settings` are the options that not all searches take."""

    method: str
    model: "Model"
    arguments: dict[str, Any]  # of the pipeline's call
    out: Path
    name: str | None
    goals: dict[str, float | None]
    settings: dict[str, Any]
    clock: "Clock"
    ending: "Ending"

    @property
    def full_name(self) -> str:
        """Of the recipe: "toys/wan/plan"."""
        return f"{self.model.name}/{self.name or self.method}"

    def file(self) -> Path:
        """The recipe's place, checked."""
        from dit_accel.search.outcome import file_of

        file = file_of(self.out, self.model.name, self.name or self.method)
        asked.check_writable(file)
        return file


def run(given: Given) -> None:
    """Search as asked."""
    others = {"harmonica": _harmonica, "moa": _elastic, "plan": _plan, "timeline": _timeline, "vorta": _vorta}
    others.get(given.method, _along)(given)


def _show(result: "Comparison", *lines: str) -> None:
    from dit_accel.cli.compare import table

    screen.print(table(result))
    for line in lines:
        say(line)


def _look(method: str) -> "Callable[..., Search]":
    if method == "ditfastattn":
        from dit_accel.search.ditfastattn.search import look
    else:
        from dit_accel.search.ditfastattn_v2.search import look
    return look


def _along(given: Given) -> None:
    """A search that runs along the pipeline."""
    from dit_accel.generate import steps_of
    from dit_accel.search.goal import FIRST_DELTAS, check_goal
    from dit_accel.search.pursuit import Pursuit

    steps = steps_of(given.model, given.arguments)
    goal = check_goal(**given.goals, steps=steps, first=FIRST_DELTAS[given.method])
    file, ending = given.file(), given.ending
    search = _look(given.method)(given.model, ending.calibration, given.arguments, **given.settings)
    state, page = file.with_suffix(".state.json"), file.with_suffix(".html")
    with Bars() as bars:
        held_out = len(ending.held_out)
        pursuit = Pursuit(search, goal, state, given.clock, bars, say, held_out=held_out)
        found = pursuit.find()
        result = pursuit.close(found, given.full_name, file, ending, page)
    minutes = found.decisions.seconds / 60
    _show(
        result,
        f"{file}: the recipe, delta {found.delta:g}, searched in {minutes:.1f} minutes",
        f"{page}: the plan, the errors behind it, the attention maps",
    )


def _plan(given: Given) -> None:
    """One plan for the whole pipeline."""
    from dit_accel.generate import steps_of
    from dit_accel.search.goal import check_goal
    from dit_accel.search.plan.command import close, open_search

    goal = check_goal(**given.goals, steps=steps_of(given.model, given.arguments), first=0.001)
    file, ending, clock = given.file(), given.ending, given.clock
    with Bars() as bars:
        found = open_search(
            given.model, given.arguments, ending, goal, clock, file, given.settings, bars, say
        )
        result = close(found, found.find(), given.full_name, file, ending, clock)
    _show(
        result, f"{file}: the recipe; {file.with_suffix('.html')}: the plan, its errors, the attention maps"
    )


def _elastic(given: Given) -> None:
    """Rules that hold for other sizes."""
    from dit_accel.search.moa.command import close, open_search

    file, ending, clock = given.file(), given.ending, given.clock
    with Bars() as bars:
        found = open_search(
            given.model, given.arguments, ending, given.goals, clock, file, given.settings, bars, say
        )
        result = close(found, found.find(), given.full_name, file, ending, clock)
    _show(result, f"{file}: the recipe; {file.with_suffix('.html')}: its rules, the attention maps")


def _vorta(given: Given) -> None:
    """Routers, trained or given."""
    from dit_accel.search.vorta.pursuit import VortaPursuit, check_routing_goal
    from dit_accel.search.vorta.routing import Routing, settings_of

    goals, settings = given.goals, given.settings
    tau, weights = settings.get("tau"), settings.get("weights")
    goal = check_routing_goal(goals["speedup"], goals["psnr"], tau)
    file, ending = given.file(), given.ending
    folder, page = file.with_suffix(".training"), file.with_suffix(".html")
    routing = Routing(given.model, ending.calibration, given.arguments, settings_of(settings), folder)
    with Bars() as bars:
        pursuit = VortaPursuit(routing, goal, tau, given.clock, bars, say, len(ending.held_out), weights)
        result = pursuit.close(pursuit.find(), given.full_name, file, ending, page)
    trained = [] if weights else [f"{folder / 'routers.safetensors'}: the routers, for --weights"]
    _show(
        result,
        f"{file}: the recipe",
        f"{page}: what the routers chose, and the losses of their training",
        *trained,
    )


def _harmonica(given: Given) -> None:
    """A router of sublayers, trained or given."""
    from dit_accel.search.harmonica.pursuit import HarmoniCaPursuit, check_caching_goal
    from dit_accel.search.harmonica.training import Training, settings_of

    asked_for, speedup = given.settings, given.goals["speedup"]
    settings, tau, weights = settings_of(asked_for), asked_for.get("tau"), asked_for.get("weights")
    check_caching_goal(settings, speedup, tau, weights is not None)
    file, ending = given.file(), given.ending
    folder, page = file.with_suffix(".training"), file.with_suffix(".html")
    kept = None if weights else folder
    training = Training(given.model, ending.calibration, given.arguments, settings, kept, speedup)
    with Bars() as bars:
        pursuit = HarmoniCaPursuit(training, tau, given.clock, bars, say, len(ending.held_out), weights)
        result = pursuit.close(pursuit.find(), given.full_name, file, ending, page)
    trained = [] if weights else [f"{folder / 'router.safetensors'}: the router, for --weights"]
    _show(
        result, f"{file}: the recipe", f"{page}: what the router chose, and its training's losses", *trained
    )


def _timeline(given: Given) -> None:
    """Whole spans of steps."""
    from dit_accel.search.timelines.search import GOALS, write_recipes

    speedup, name = given.goals["speedup"], given.name
    goals = GOALS if speedup is None else {name or f"timeline-{speedup:g}x": speedup}
    if speedup is None and name is not None:
        raise BadUsage(
            f'asked for the name "{name}"; without --speedup three recipes are made: {", ".join(GOALS)}. '
            "Give --speedup with it."
        )
    write_recipes(given.model, given.arguments, given.ending, goals, given.out, say)
