"""Runs that reuse at single steps: what an error of the velocity there comes to in the frames."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dit_accel import api
from dit_accel.compare import Job
from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.replay import Replay
from dit_accel.search.rows import site_of
from dit_accel.search.subject import Subject, denoisers_of

Told = Callable[[int, int], None]
PROBES = 10  # runs of a prompt that tell what errors at single steps come to


def probed_at(steps: int) -> list[int]:
    """Steps at which a run tells what errors come to: ever closer towards the end.

    There the weights change most from step to step, and a run is short: what lies before it is replayed.
    """
    left = np.geomspace(1, steps - 1, min(PROBES, steps - 1)).round().astype(int)
    return sorted({steps - int(each) for each in left})


def step_weights(
    subject: Subject,
    job: Job,
    noted: Mapping[Key, Noted],
    backend: Collection[Key] = (),
    told: Told = lambda done, total: None,
) -> np.ndarray:
    """[T]: how many times a squared error of the velocity at a step comes out in the frames.

    At some steps a run lets all self-attention reuse its outputs at that step alone: what the frames moved
    by is divided by what was scored for it. The others are interpolated in their logarithms; step 0 has
    nothing to reuse and takes the first factor. Full attention of `backend` is not the model's own.
    """
    steps, replay = len(subject.levels), Replay(denoisers_of(subject.model))
    with replay.recording():
        dense = generate(subject.model, job.prompt, subject.arguments, job.seed).frames
    probed = probed_at(steps)
    factors: list[float] = []
    for done, step in enumerate(probed):
        told(done, len(probed))
        with (
            api.accelerated(subject.model.pipe, reusing_at(subject, step, subject.layers(), backend)),
            replay.until(step - 1),
        ):
            frames = generate(subject.model, job.prompt, subject.arguments, job.seed).frames
        moved = float(np.square(frames.astype(np.float64) - dense).sum())
        scored = sum(float(noted[key].module[step, 0]) for key in subject.layers())
        factors.append(np.log(max(moved, 1e-12) / max(scored, 1e-30)))
    return np.exp(np.interp(np.arange(steps), probed, factors))


def reusing_at(subject: Subject, step: int, keys: Sequence[Key], backend: Collection[Key] = ()) -> Recipe:
    """Some attentions answer with their last output at one step.

    At the others that of `backend` runs through the fastest one: as exact, and faster.
    """
    row = "C" * step + "r" + "C" * (len(subject.levels) - step - 1)
    tables: dict[str, Any] = {"timeline": {"both": {site_of(key): row for key in keys}}}
    if backend:
        tables |= {"attention": {"both": {site_of(key): ["F"] for key in backend}}}
    return Recipe.from_dict(
        {
            "schema": 1,
            "made_for": {**subject.made_for, "steps": len(row)},
            "choices": {
                "C": {"method": "compute"},
                "F": {"method": "full", "backend": "auto"},
                "r": {"method": "reuse", "max_age": 1},
            },
            **tables,
        },
        name="probe",
    )
