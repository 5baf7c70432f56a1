"""The plan search as a user asks for it: its budget, its state file, its end on held-out prompts."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.compare import Comparison, Watch
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.search.goal import Goal
from dit_accel.search.method import asked_of
from dit_accel.search.outcome import Ending, finish
from dit_accel.search.page import write_page
from dit_accel.search.plan.picture import picture
from dit_accel.search.plan.search import PlanSearch, Tried
from dit_accel.search.plan.state import State
from dit_accel.search.pursuit import VERIFYING, Clock
from dit_accel.search.subject import check_memory, look
from dit_accel.search.trajectory import guidance_of

MEASURED = 3  # what a state file holds; one that was measured otherwise is refused


def open_search(
    model: Model, arguments: Mapping[str, Any], ending: Ending, goal: Goal, clock: Clock, file: Path,
    settings: Mapping[str, Any], watch: Watch, tell: Callable[[str], None],
) -> PlanSearch:  # fmt: skip
    """A search that goes on from the state file beside `file`.

    Raises BadUsage where there is nothing to search, no guidance, or too little memory for what it keeps.
    """
    subject = look(model, ending.calibration, arguments, settings.get("sites", ()))
    guidance_of(model, subject.family, arguments)
    memory_gb = settings.get("memory_gb")
    state = State(
        file.with_suffix(".state.safetensors"), asked_of(subject) | {"method": "plan", "measured": MEASURED}
    )
    search = PlanSearch(
        subject,
        goal,
        state,
        watch,
        tell,
        clock.left,
        lambda seconds: reserve(clock, seconds, ending),
        memory_gb,
    )
    check_memory(subject, search.stored_bytes(), None)  # a bound of the recipe is none of the search
    return search


def reserve(clock: Clock, dense: float, ending: Ending) -> None:
    """Keep back the time that verification takes, known once a dense generation was timed."""
    clock.reserve = dense * (1 + VERIFYING * len(ending.held_out))
    if clock.ended():
        raise BadUsage(
            f"asked to search within {clock.minutes:g} minutes; to verify the recipe alone takes about "
            f"{clock.reserve / 60:.1f}. Give more --minutes, or a smaller --held-out."
        )


def close(search: PlanSearch, best: Tried, name: str, file: Path, ending: Ending, clock: Clock) -> Comparison:
    """Verify on held-out prompts, write the recipe and the page."""
    recipe = dataclasses.replace(best.recipe, name=name)
    more = {
        "method": "plan",
        "goal": f"{search.goal.kind} {search.goal.value:g}",
        "search_minutes": clock.spent_minutes(),
        "kernel_alone": round(search.kernel_alone, 3),
    }
    subject = search.subject
    _, result = finish(subject.model, recipe, subject.arguments, file, ending, search.watch, more)
    shown = picture(best.plan, [(each.plan, each.measured) for each in search.tried])
    write_page(file.with_suffix(".html"), result, subject, shown)
    return result
