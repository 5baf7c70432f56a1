"""Every prompt runs every column, in an order that turns from prompt to prompt; nothing of a column stays.

Switching on and off is not timed, and neither are the warm-up of each column and MagCache's calibration,
whose cost stands in its rows. A column that raises becomes a row with its error; dense may not.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dit_accel import api, metrics
from dit_accel.bench.attention import dense_through_op, through_op
from dit_accel.bench.columns import Bench, Column
from dit_accel.bench.form import Form, blocks_compiled
from dit_accel.bench.rivals import RIVALS, STEPS, Setting, fewer_steps, switched_on
from dit_accel.bench.scene import Scene, guided
from dit_accel.bench.work import counted
from dit_accel.compare import BEST_PSNR, Job, Watch, frames_ssim
from dit_accel.errors import BadUsage, DitAccelError
from dit_accel.generate import Sample, generate, steps_of
from dit_accel.loading import Model
from dit_accel.recipe import Recipe

WARM_UP_STEPS = 4  # enough for a cache to skip once; recipes warm up on all of theirs
UNKNOWN = "dit_accel does not know this model's family, so it cannot tell where the peer is valid"


@dataclass(frozen=True)
class Entrant:
    """How one column is switched on."""

    changes: Mapping[str, Any] = field(default_factory=dict)  # of the call's arguments
    recipe: Recipe | None = None
    rival: tuple[str, Setting] | None = None


@dataclass(frozen=True)
class Asked:
    """What is benched, on what."""

    against: Sequence[tuple[str, Setting | None]]
    recipes: Sequence[Recipe]
    jobs: Sequence[Job]
    calibration: Job  # not among the jobs
    warm_up: bool = True


def check_recipes(model: Model, recipes: Sequence[Recipe]) -> None:
    """Refuse recipes that do not fit the pipeline, before any generation; nothing stays installed."""
    for recipe in recipes:
        try:
            api.accelerate(model.pipe, recipe, strict=model.family is None).restore()
        except DitAccelError as error:
            raise BadUsage(f"asked to bench the recipe {recipe.name} on {model.name}: {error}") from error


class Benching:
    """One bench; `result` can be read at any time."""

    def __init__(self, model: Model, arguments: Mapping[str, Any], form: Form, asked: Asked) -> None:
        steps = steps_of(model, arguments)
        self.model, self.form, self.asked, self.steps = model, form, asked, steps
        self.arguments = {**arguments, "num_inference_steps": steps}  # some peers read it from the call
        self.guided = model.family is not None and guided(arguments, model.family, model.pipe)
        self.eager: set[str] = set()  # columns that cannot run in the compiled form
        self.ratios: dict[str, Mapping[str, Sequence[float]]] = {}  # by rival
        self.done, left_out = 0, {}
        self.entrants = {"dense": Entrant()} | self._rivals(left_out)
        self.entrants |= {f"dit_accel:{recipe.name}": Entrant(recipe=recipe) for recipe in asked.recipes}
        columns = [
            Column(name, int(entrant.changes.get("num_inference_steps", steps)))
            for name, entrant in self.entrants.items()
        ]
        self.result = Bench(model, self.arguments, asked.jobs, form, columns, left_out)

    def _rivals(self, left_out: dict[str, str]) -> dict[str, Entrant]:
        entrants: dict[str, Entrant] = {}
        for name, setting in self.asked.against:
            if name == STEPS:
                counts = fewer_steps(self.steps) if setting is None else [int(setting)]
                entrants |= {f"{STEPS}:{n}": Entrant({"num_inference_steps": n}) for n in counts}
                continue
            rival = RIVALS[name]
            why = UNKNOWN if self.model.family is None else rival.why_not(self._scene())
            if why is not None:
                left_out[name] = why
                continue
            settings = rival.ladder if setting is None else (setting,)
            entrants |= {f"{name}:{each}": Entrant(rival=(name, each)) for each in settings}
        return entrants

    def run(self, watch: Watch) -> None:
        """Warm up, calibrate, then every prompt."""
        self.watch = watch
        columns, jobs = self.result.columns, self.asked.jobs
        calibrated = {entrant.rival[0] for entrant in self.entrants.values() if entrant.rival}
        calibrated = {name for name in calibrated if RIVALS[name].calibrate is not None}
        self.total = len(columns) * (len(jobs) + self.asked.warm_up) + len(calibrated)
        for name in sorted(calibrated):
            self._calibrate(name)
        if self.asked.warm_up:
            for column in columns:
                self._warm_up(column)
        for index, job in enumerate(jobs):
            self._prompt(index % len(columns), job)

    def stopped(self) -> None:
        """Tell in the rows which columns were not reached."""
        self.result.notes.append("stopped by the user")
        for column in self.result.columns:
            if not column.seconds and column.error is None:
                column.error = "not reached: stopped by the user"

    def _prompt(self, first: int, job: Job) -> None:
        """All columns on one prompt; the last `first` of them run before the others, dense among these."""
        columns = self.result.columns
        waiting: list[tuple[Column, Sample, int | None]] = []
        dense: Sample | None = None
        for column in columns[len(columns) - first :] + columns[: len(columns) - first]:
            ran = self._guarded(column, f"{column.name}: {job.prompt}", job, {})
            if ran is None:
                continue
            waiting.append((column, *ran))
            dense = ran[0] if column is self.result.dense else dense
            if dense is not None:
                for each in waiting:
                    _record(*each, dense, job)
                waiting.clear()

    def _guarded(
        self, column: Column, what: str, job: Job, changes: Mapping[str, Any]
    ) -> tuple[Sample, int | None] | None:
        """One generation; None, and the error in the column, where it raises."""
        if column.error is not None:
            self.done += 1
            return None
        self.watch.generation(self.done, self.total, what)
        try:
            return self._generate(column, job, changes)
        except Exception as error:
            if column is self.result.dense:
                raise
            column.error = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None
        finally:
            self.done += 1

    def _generate(self, column: Column, job: Job, changes: Mapping[str, Any]) -> tuple[Sample, int | None]:
        entrant = self.entrants[column.name]
        arguments = {**self.arguments, **entrant.changes, **changes}
        compiled = self.form.compiled and column.name not in self.eager
        with ExitStack() as on:
            work = on.enter_context(self._counted(compiled))
            handle = on.enter_context(self._switched_on(entrant, int(arguments["num_inference_steps"])))
            on.enter_context(blocks_compiled(self.model, compiled))
            sample = generate(self.model, job.prompt, arguments, job.seed, self.watch.step)
            if handle is not None:
                report = handle.report()
                column.attention_kept, column.counters = report.attention_kept, dict(report.counters)
                for note in report.notes:
                    column.note(note)
        self.result.memory_measured = sample.peak.measured
        return sample, None if work is None else work.samples

    def _counted(self, compiled: bool) -> AbstractContextManager[Any]:
        # a counter inside a compiled block would break its graph
        if compiled or self.model.family is None:
            return nullcontext()
        return counted(self.model.pipe, self.model.family)

    @contextmanager
    def _switched_on(self, entrant: Entrant, steps: int) -> Iterator[api.Handle | None]:
        op = self.form.attention == "op"
        if entrant.recipe is not None:
            recipe = through_op(entrant.recipe) if op else entrant.recipe
            with api.accelerated(self.model.pipe, recipe) as handle:
                yield handle
            return
        with ExitStack() as on:
            if entrant.rival is not None:
                name, setting = entrant.rival
                scene = self._scene(steps, self.ratios.get(name, {}))
                on.enter_context(switched_on(RIVALS[name], setting, scene))
            if op:  # above the rival: cache-dit hides the blocks from what lies beneath it
                on.enter_context(api.accelerated(self.model.pipe, dense_through_op()))
            yield None

    def _scene(self, steps: int | None = None, ratios: Mapping[str, Sequence[float]] | None = None) -> Scene:
        assert self.model.family is not None  # rivals of an unknown family are left out
        return Scene(self.model.pipe, self.model.family, steps or self.steps, self.guided, ratios or {})

    def _warm_up(self, column: Column) -> None:
        entrant, job = self.entrants[column.name], self.asked.jobs[0]
        steps = column.steps if entrant.recipe else min(WARM_UP_STEPS, column.steps)
        few = {"num_inference_steps": steps}
        self._guarded(column, f"warm-up, {column.name}", job, few)
        if column.error is not None and self.form.compiled:
            column.note(f"ran eager: compiled it raised {column.error}")
            self.eager.add(column.name)
        # few steps may be fewer than a peer can use: the runs that count decide
        column.error = None

    def _calibrate(self, name: str) -> None:
        """One dense run on a prompt that is not benched, at the price that its rows tell."""
        calibrate, job = RIVALS[name].calibrate, self.asked.calibration
        assert calibrate is not None
        columns = [
            each
            for each in self.result.columns
            if (rival := self.entrants[each.name].rival) is not None and rival[0] == name
        ]
        spent: list[float] = []

        def run() -> None:
            spent.append(generate(self.model, job.prompt, self.arguments, job.seed, self.watch.step).seconds)

        self.watch.generation(self.done, self.total, f"calibration of {name}")
        try:
            self.ratios[name] = calibrate(self._scene(), run)
        except Exception as error:
            for column in columns:
                column.error = f"calibration: {type(error).__name__}: {error}".splitlines()[0]
        for column in columns:
            column.calibration_seconds = sum(spent)
        self.done += 1


def _record(column: Column, sample: Sample, samples: int | None, dense: Sample, job: Job) -> None:
    column.seconds.append(sample.seconds)
    column.ratios.append(dense.seconds / sample.seconds)
    column.psnr.append(min(BEST_PSNR, float(metrics.psnr(sample.frames, dense.frames))))
    column.ssim.append(frames_ssim(sample.frames, dense.frames))
    column.equal.append(bool(np.array_equal(sample.frames, dense.frames)))
    scored = metrics.faithfulness(sample.frames, job.prompt)
    if scored is not None:
        column.faithfulness.append(float(scored))
    if sample.peak.bytes_ is not None:
        column.peak_bytes.append(sample.peak.bytes_)
    if samples is not None:
        column.samples.append(samples)
