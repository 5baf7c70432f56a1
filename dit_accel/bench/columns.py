"""What was measured of each column, and the rows that it becomes (design.md 10)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import numpy as np

from dit_accel.bench.form import Form
from dit_accel.compare import Job
from dit_accel.generate import steps_of
from dit_accel.loading import Model
from dit_accel.machine import device_name, version_of, versions
from dit_accel.results import shape_of

ENOUGH = 5  # runs from which quantiles say more than the extremes
NOTHING = "changed nothing: its frames are bit-equal to dense and it skipped no work"


@dataclass
class Column:
    """One way to run the pipeline; lists have a value for each job that it finished."""

    name: str
    steps: int
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # dense seconds of the same prompt over its own
    peak_bytes: list[int] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)  # against dense, on decoded frames
    ssim: list[float] = field(default_factory=list)
    faithfulness: list[float] = field(default_factory=list)
    equal: list[bool] = field(default_factory=list)  # frames bit-equal to dense
    samples: list[int] = field(default_factory=list)  # sublayer forwards; empty where they are not counted
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    attention_kept: float | None = None
    counters: dict[str, int] = field(default_factory=dict)
    calibration_seconds: float | None = None

    def note(self, text: str) -> None:
        """Remember something that a reader of the row must know, once."""
        if text not in self.notes:
            self.notes.append(text)

    def work(self, dense: "Column") -> float | None:
        """Share of the dense column's sublayer forwards that ran; those of fewer steps are fewer."""
        return median(self.samples) / median(dense.samples) if self.samples and dense.samples else None

    def did_nothing(self, dense: "Column") -> bool:
        """Whether it was accepted and changed neither the result nor the work."""
        work = self.work(dense)
        return self is not dense and bool(self.equal) and all(self.equal) and (work is None or work >= 1)

    def row(self, dense: "Column") -> dict[str, Any]:
        """The row: without an error its numbers, and what there is of them with one."""
        row: dict[str, Any] = {"name": self.name, "steps": self.steps, "error": self.error}
        if self.seconds:
            row |= {"seconds": median(self.seconds), "runs": len(self.seconds)} | _spread(self.seconds)
            row |= {"speedup": median(self.ratios), "peak_bytes": max(self.peak_bytes, default=None)}
            row |= {name: _mean(getattr(self, name)) for name in ("psnr", "ssim", "faithfulness")}
            row |= {"work": self.work(dense)}
        notes = [*self.notes, NOTHING] if self.did_nothing(dense) else self.notes
        row |= {"changed_nothing": True} if self.did_nothing(dense) else {}
        row |= {"notes": notes} if notes else {}
        for name in ("attention_kept", "calibration_seconds"):
            row |= {name: getattr(self, name)} if getattr(self, name) is not None else {}
        return row | ({"counters": self.counters} if self.counters else {})


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < ENOUGH:
        return {"seconds_min": min(seconds), "seconds_max": max(seconds)}
    low, high = np.quantile(seconds, (0.2, 0.8))
    return {"seconds_20": float(low), "seconds_80": float(high)}


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


@dataclass
class Bench:
    """All that was measured; grows while the bench runs, so that an interrupted one is worth its runs."""

    model: Model
    arguments: Mapping[str, Any]
    jobs: Sequence[Job]
    form: Form
    columns: list[Column]  # dense first
    left_out: Mapping[str, str]  # rival -> why it is not valid here
    notes: list[str] = field(default_factory=list)
    memory_measured: str = ""

    @property
    def dense(self) -> Column:
        """The reference of speed and quality."""
        return self.columns[0]

    def as_dict(self) -> dict[str, Any]:
        """The object of `bench --json`; `speedup` is the median of the ratios prompt by prompt."""
        shape = shape_of({**self.arguments, "num_inference_steps": steps_of(self.model, self.arguments)})
        peers = {"cache_dit": version_of("cache-dit")}
        return {
            "rows": [column.row(self.dense) for column in self.columns],
            "model": self.model.name,
            "toy": self.model.toy,
            "versions": versions() | {name: version for name, version in peers.items() if version},
            "device": device_name(),
            "shape": shape,
            "dtype": self.form.dtype,
            "compiled": self.form.compiled,
            "attention": self.form.attention,
            "seeds": sorted({job.seed for job in self.jobs}),
            "runs": len(self.dense.seconds),
            "interleaved": len(self.columns),
            "prompts": [job.prompt for job in self.jobs],
            "left_out": dict(self.left_out),
            "memory_measured": self.memory_measured,
            "notes": self.notes,
        }
