"""The search of elastic rules as a user asks for it: sizes, a goal, a budget, its end on held-out prompts."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.compare import Comparison, Watch
from dit_accel.errors import BadUsage
from dit_accel.generate import call_arguments
from dit_accel.loading import Model
from dit_accel.search.goal import Goal
from dit_accel.search.method import FULLS, asked_of
from dit_accel.search.moa.search import INTERVAL, ElasticSearch, Tried
from dit_accel.search.moa.writing import picture
from dit_accel.search.outcome import Ending, finish
from dit_accel.search.page import write_page
from dit_accel.search.plan.command import reserve
from dit_accel.search.plan.state import State
from dit_accel.search.pursuit import Clock
from dit_accel.search.subject import Subject, check_memory, look
from dit_accel.search.trajectory import guidance_of

NAMES = ("height", "width", "num_frames")
MEASURED = 1  # what a state file holds; one that was measured otherwise is refused


def sizes_of(texts: Sequence[str]) -> list[dict[str, int]]:
    """Sizes as call arguments, of "HEIGHTxWIDTH" or "HEIGHTxWIDTHxFRAMES"."""
    found: list[dict[str, int]] = []
    for text in texts:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
            raise BadUsage(
                f'asked to calibrate at --sizes "{text}"; a size is HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES. '
                "Write it so, one --sizes for each."
            )
        found.append(dict(zip(NAMES, map(int, text.split("x")), strict=False)))
    if not found:
        raise BadUsage(
            "asked to search for elastic rules; no size to calibrate at was given. Give two or three that "
            "are not the one you generate at: --sizes 64x64x17 --sizes 48x48x33."
        )
    return found


def check_bound(density: float | None, goals: Mapping[str, float | None]) -> Goal | None:
    """The goal, None where a bound of the work is given or nothing is."""
    given = {name: value for name, value in {**goals, "density": density}.items() if value is not None}
    if len(given) > 1:
        asked = " and ".join(f"--{name} {value:g}" for name, value in given.items())
        raise BadUsage(f"asked to search for elastic rules by {asked}. Give one of them.")
    for name, value in given.items():
        least, most = {"density": (0.0, 1.0), "speedup": (1.0, 100.0), "psnr": (0.0, 100.0)}[name]
        if not least < value < most:
            raise BadUsage(
                f"asked for --{name} {value:g}; it must be over {least:g} and under {most:g}. "
                "Ask for another."
            )
    asked = next((name for name in given if name != "density"), None)
    return None if asked is None else Goal(asked, given[asked])


def open_search(
    model: Model, arguments: Mapping[str, Any], ending: Ending, goals: Mapping[str, float | None],
    clock: Clock, file: Path, settings: Mapping[str, Any], watch: Watch, tell: Callable[[str], None],
) -> ElasticSearch:  # fmt: skip
    """A search that goes on from the state files beside `file`, one for each size.

    Raises BadUsage for sizes that are none, equal, or the one it chooses at; and where there is nothing to
    search, no guidance, or too little memory.
    """
    goal, full = check_bound(settings.get("density"), goals), settings.get("full", "model")
    if full not in FULLS:
        raise BadUsage(f'asked for full heads by "{full}"; known: {", ".join(FULLS)}. Give one of them.')
    sites = settings.get("sites", ())
    target = look(model, ending.calibration, arguments, sites)
    guidance_of(model, target.family, arguments)
    sizes = sizes_of(settings.get("sizes", ()))
    calibrated = [_subject_at(model, target, size, sites) for size in sizes]
    _check_grids([each.grid for each in calibrated], target)
    states = [
        State(_state_of(file, size), asked_of(each) | {"method": "moa", "measured": MEASURED})
        for size, each in zip(sizes, calibrated, strict=True)
    ]
    search = ElasticSearch(
        calibrated, target, states, watch, tell, clock.left, goal, settings.get("density", 0.6), full,
        settings.get("interval", INTERVAL), lambda seconds: reserve(clock, seconds, ending),
    )  # fmt: skip
    check_memory(max(calibrated, key=lambda each: each.stored_rows), search.stored_bytes(), None)
    return search


def _subject_at(model: Model, target: Subject, size: Mapping[str, int], sites: Sequence[str]) -> Subject:
    call_arguments(model, size)  # refuses frames of a picture
    return look(model, target.jobs, {**target.arguments, **size}, sites)


def _check_grids(grids: Sequence[tuple[int, int, int]], target: Subject) -> None:
    if len(set(grids)) < len(grids) or (len(grids) > 1 and target.grid in grids):
        raise BadUsage(
            f"asked to calibrate at {', '.join(map(str, grids))} tokens and to choose at {target.grid}; "
            "rules are told apart by sizes that differ, and chosen at one that was not calibrated. "
            "Give other --sizes."
        )


def _state_of(file: Path, size: Mapping[str, int]) -> Path:
    return file.with_suffix(f".{'x'.join(map(str, size.values()))}.state.safetensors")


def close(
    search: ElasticSearch, best: Tried, name: str, file: Path, ending: Ending, clock: Clock
) -> Comparison:
    """Verify on held-out prompts, write the recipe and the page."""
    recipe = dataclasses.replace(best.recipe, name=name)
    more: dict[str, Any] = {
        "method": "moa",
        "calibrated_at": [list(each.grid) for each in search.calibrated],
        "chosen_at": list(search.target.grid),
        "density": round(best.bound, 4),
        "search_minutes": clock.spent_minutes(),
    }
    if search.goal is not None:
        more["goal"] = f"{search.goal.kind} {search.goal.value:g}"
    subject = search.target
    _, result = finish(subject.model, recipe, subject.arguments, file, ending, search.watch, more)
    tried = [
        [
            f"{each.bound:.0%}",
            ", ".join(f"{error:.3g}" for error in each.foretold),
            f"{each.measured['speedup']:.2f}x",
            f"{each.measured['psnr']:.1f} dB",
        ]
        for each in search.tried
    ]
    shown = picture(best.assigned, search.starts, len(subject.levels), tried)
    write_page(file.with_suffix(".html"), result, subject, shown)
    return result
