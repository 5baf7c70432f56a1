"""Dense against accelerated, on the same prompts and seeds, in one process.

Both take turns and change order from prompt to prompt, so that a machine that slows down slows both;
warm-up runs are left out; medians are reported. The rival is the dense sampler with fewer steps: what
anybody gets for free.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Protocol

import numpy as np

from dit_accel import api, media, metrics
from dit_accel.errors import BadUsage
from dit_accel.generate import Sample, generate, steps_of
from dit_accel.loading import Model
from dit_accel.machine import device_name, versions
from dit_accel.recipe import Recipe
from dit_accel.run_report import Report
from dit_accel.stages import STAGES

BEST_PSNR = 100.0  # dB; stands for identical frames, as JSON has no infinity
WARM_UP_STEPS = 2  # dense: every step does the same work


@dataclass(frozen=True)
class Job:
    """What is generated: by each column once."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Options:
    """How to compare."""

    rival_steps: int | str | None = (
        None  # a number, "auto" (as many as fit into the recipe's time), or no rival
    )
    strict: bool = False
    warm_up: bool = True
    films: int = 8  # prompts whose frames are kept for the page


@dataclass
class Column:
    """One way to run the pipeline: the values of its runs, a value for each job."""

    name: str
    steps: int
    seconds: list[float] = field(default_factory=list)
    stages: list[Mapping[str, float]] = field(default_factory=list)
    peak_bytes: list[int | None] = field(default_factory=list)
    growth: list[int | None] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)  # against dense, on decoded frames
    ssim: list[float] = field(default_factory=list)
    faithfulness: list[float | None] = field(default_factory=list)
    films: list[bytes] = field(default_factory=list)  # mp4 or png

    def median_stages(self) -> dict[str, float]:
        """Median seconds of each stage."""
        return {stage: median(each[stage] for each in self.stages) for stage in STAGES}

    def mean(self, name: str) -> float | None:
        """The mean of a quality over the jobs that have it."""
        values = [value for value in getattr(self, name) if value is not None]
        return fmean(values) if values else None

    def peak(self, name: str = "peak_bytes") -> int | None:
        """The highest value of any run."""
        return max((value for value in getattr(self, name) if value is not None), default=None)


@dataclass
class Comparison:
    """All that was measured."""

    model: Model
    recipe: Recipe
    arguments: Mapping[str, Any]
    jobs: Sequence[Job]
    columns: dict[str, Column]  # "dense", "recipe" and, if asked for, "rival"
    report: Report | None = None  # of the last accelerated run
    counters: Counter[str] = field(default_factory=Counter)  # over all accelerated runs
    notes: list[str] = field(default_factory=list)
    memory_measured: str = ""

    def speedup(self, column: str = "recipe") -> float:
        """Median seconds of dense over those of a column."""
        return median(self.columns["dense"].seconds) / median(self.columns[column].seconds)

    def as_dict(self) -> dict[str, Any]:
        """The object of `compare --json`; design.md 10 names the first nine keys."""
        dense, recipe = self.columns["dense"], self.columns["recipe"]
        return {
            "dense_seconds": median(dense.seconds),
            "recipe_seconds": median(recipe.seconds),
            "speedup": self.speedup(),
            "psnr": recipe.mean("psnr"),
            "ssim": recipe.mean("ssim"),
            "faithfulness": {"dense": dense.mean("faithfulness"), "recipe": recipe.mean("faithfulness")},
            "attention_kept": self.report.attention_kept if self.report else None,
            "counters": dict(self.counters),
            "peak_bytes": recipe.peak(),
            "versions": versions(),
            "device": device_name(),
            "model": self.model.name,
            "toy": self.model.toy,
            "recipe": self.recipe.name,
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "jobs": [{"prompt": job.prompt, "seed": job.seed} for job in self.jobs],
            "columns": {name: self._column(name) for name in self.columns},
            "memory_measured": self.memory_measured,
            "report": self.report.as_dict() if self.report else None,
            "notes": self.notes,
        }

    def _column(self, name: str) -> dict[str, Any]:
        column = self.columns[name]
        return {
            "steps": column.steps,
            "seconds": median(column.seconds),
            "speedup": self.speedup(name),
            "stages": column.median_stages(),
            "psnr": column.mean("psnr"),
            "ssim": column.mean("ssim"),
            "faithfulness": column.mean("faithfulness"),
            "peak_bytes": column.peak(),
            "growth_bytes": column.peak("growth"),
            "each": {
                key: getattr(column, key) for key in ("seconds", "stages", "psnr", "ssim", "faithfulness")
            },
        }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class Watch(Protocol):
    """Hears how far a comparison is."""

    def generation(self, done: int, total: int, what: str) -> None:
        """Generation `done` of `total` begins."""

    def step(self, done: int, total: int) -> None:
        """A denoising step has ended."""


class _Nobody:
    def generation(self, done: int, total: int, what: str) -> None: ...

    def step(self, done: int, total: int) -> None: ...


def compare(
    model: Model,
    recipe: Recipe,
    jobs: Sequence[Job],
    arguments: Mapping[str, Any],
    options: Options = Options(),
    watch: Watch | None = None,
) -> Comparison:
    """Generate every job in every column, and measure."""
    if not jobs:
        raise BadUsage("asked to compare on no prompts; give at least one.")
    return _Comparing(model, recipe, jobs, arguments, options, watch or _Nobody()).run()


class _Comparing:
    """The state of one `compare` call."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        jobs: Sequence[Job],
        arguments: Mapping[str, Any],
        options: Options,
        watch: Watch,
    ) -> None:
        steps = steps_of(model, arguments)
        columns = {"dense": Column("dense", steps), "recipe": Column(recipe.name, steps)}
        self.result = Comparison(model, recipe, arguments, jobs, columns)
        self.options, self.watch, self.steps = options, watch, steps
        self.rival = options.rival_steps  # "auto" until the first pair is measured
        if isinstance(self.rival, int) and not self.rival >= 1:
            raise BadUsage(f"asked for a rival of {self.rival} steps; it needs at least 1.")
        if self.rival is not None and self.rival != "auto":
            columns["rival"] = Column(f"dense, {self.rival} steps", int(self.rival))
        per_job = 2 + (self.rival is not None)
        self.total, self.done = len(jobs) * per_job + 2 * options.warm_up, 0

    def run(self) -> Comparison:
        """Warm up, then every job."""
        if self.options.warm_up:
            # the recipe first: one that does not fit this model fails before any other work
            self._accelerated("warm-up, recipe", self.result.jobs[0])
            few = {**self.result.arguments, "num_inference_steps": min(WARM_UP_STEPS, self.steps)}
            self._generate("warm-up, dense", self.result.jobs[0], few)
        for index, job in enumerate(self.result.jobs):
            self._job(index, job)
        return self.result

    def _job(self, index: int, job: Job) -> None:
        order = list(self.result.columns)
        samples = {name: self._sample(name, job) for name in (order if index % 2 == 0 else order[::-1])}
        if self.rival == "auto":
            self._pick_rival(samples["dense"], samples["recipe"])
            if "rival" in self.result.columns:
                samples["rival"] = self._sample("rival", job)
        for name, sample in samples.items():
            self._record(
                self.result.columns[name],
                sample,
                samples["dense"].frames,
                job,
                keep=index < self.options.films,
            )

    def _sample(self, name: str, job: Job) -> Sample:
        what = f"{self.result.columns[name].name}: {job.prompt}"
        if name == "recipe":
            sample, report = self._accelerated(what, job)
            self.result.report = report
            self.result.counters.update(report.counters)
            self.result.notes += [note for note in report.notes if note not in self.result.notes]
            return sample
        steps = {"num_inference_steps": self.result.columns[name].steps} if name == "rival" else {}
        return self._generate(what, job, {**self.result.arguments, **steps})

    def _accelerated(self, what: str, job: Job) -> tuple[Sample, Report]:
        with api.accelerated(
            self.result.model.pipe, self.result.recipe, strict=self.options.strict
        ) as handle:
            sample = self._generate(what, job, self.result.arguments)
            return sample, handle.report()

    def _generate(self, what: str, job: Job, arguments: Mapping[str, Any]) -> Sample:
        self.watch.generation(self.done, self.total, what)
        sample = generate(self.result.model, job.prompt, arguments, job.seed, self.watch.step)
        self.done += 1
        self.result.memory_measured = sample.peak.measured
        return sample

    def _pick_rival(self, dense: Sample, recipe: Sample) -> None:
        """As many dense steps as fit into the recipe's denoising time, from the first pair."""
        share = recipe.stages["denoising"] / dense.stages["denoising"]
        self.rival = max(1, round(self.steps * share))
        if self.rival >= self.steps:
            self.total -= len(self.result.jobs)
            self.result.notes.append(
                "the recipe is not faster than dense here: fewer steps have nothing to rival"
            )
            return
        self.result.columns["rival"] = Column(f"dense, {self.rival} steps", self.rival)

    def _record(self, column: Column, sample: Sample, dense: np.ndarray, job: Job, keep: bool) -> None:
        column.seconds.append(sample.seconds)
        column.stages.append(sample.stages)
        column.peak_bytes.append(sample.peak.bytes_)
        column.growth.append(sample.peak.growth)
        column.psnr.append(min(BEST_PSNR, float(metrics.psnr(sample.frames, dense))))
        column.ssim.append(frames_ssim(sample.frames, dense))
        scored = metrics.faithfulness(sample.frames, job.prompt)
        column.faithfulness.append(None if scored is None else float(scored))
        if keep:
            column.films.append(film(sample.frames, self.result.model.fps))


def frames_ssim(frames: np.ndarray, dense: np.ndarray) -> float:
    """Frame by frame: a long video at once would need many times its size."""
    return fmean(metrics.ssim(frames[i : i + 1], dense[i : i + 1]) for i in range(len(frames)))


def film(frames: np.ndarray, fps: int) -> bytes:
    """Frames as a file for a page: mp4, or png for one frame."""
    return media.png(frames[0]) if len(frames) == 1 else media.mp4(frames, fps, enlarge=True)
