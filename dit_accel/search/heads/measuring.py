"""The measurements behind a plan: where the seconds go, how errors travel, what every choice costs.

For each calibration prompt: one scored run, and runs that reuse at single steps, which tell what an error
of the velocity makes of the frames. How attentions are felt is looked at once, on the first prompt.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from dit_accel import api
from dit_accel.compare import Job
from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.heads.candidates import Candidate
from dit_accel.search.heads.felt import Felt, Rows, Stream
from dit_accel.search.heads.noted import Noted
from dit_accel.search.heads.replay import Replay
from dit_accel.search.heads.scores import Layer, run_scored
from dit_accel.search.heads.sensitivity import Channels, between, looked_at, recording, sensitivities
from dit_accel.search.subject import Subject, denoisers_of
from dit_accel.search.trajectory import guidance_of
from dit_accel.stages import now

Told = Callable[[int, int], None]
PROBES = 10  # runs of a prompt that tell what errors at single steps come to


@dataclass
class Dense:
    """The dense pipeline: seconds of a generation, and of one attention module on one branch."""

    seconds: float
    module: dict[Key, float]


def measure_dense(subject: Subject) -> Dense:
    """Time one dense generation, after another that warms up."""
    branches = 2 if subject.family.guidance == "batched" else 1
    job = subject.jobs[0]
    generate(subject.model, job.prompt, subject.arguments, job.seed)
    with _timed_modules(subject) as spent:
        sample = generate(subject.model, job.prompt, subject.arguments, job.seed)
    return Dense(sample.seconds, {key: median(each) / branches for key, each in spent.items() if each})


@contextlib.contextmanager
def _timed_modules(subject: Subject) -> Iterator[dict[Key, list[float]]]:
    spent: dict[Key, list[float]] = {key: [] for key in subject.all_attention()}
    began: dict[Key, float] = {}
    hooks = []
    for key in spent:
        module = denoisers_of(subject.model)[key[0]].get_submodule(key[1])

        def start(_module: nn.Module, _args: Any, key: Key = key) -> None:
            began[key] = now()

        def stop(_module: nn.Module, _args: Any, _out: Any, key: Key = key) -> None:
            spent[key].append(now() - began[key])

        hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


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
    told: Told = lambda done, total: None,
) -> np.ndarray:
    """[T]: how many times a squared error of the velocity at a step comes out in the frames.

    At some steps a run lets all self-attention reuse its outputs at that step alone: what the frames moved
    by is divided by what was scored for it. The others are interpolated in their logarithms; step 0 has
    nothing to reuse and takes the first factor.
    """
    steps, replay = len(subject.levels), Replay(denoisers_of(subject.model))
    with replay.recording():
        dense = generate(subject.model, job.prompt, subject.arguments, job.seed).frames
    probed = probed_at(steps)
    factors: list[float] = []
    for done, step in enumerate(probed):
        told(done, len(probed))
        with api.accelerated(subject.model.pipe, reusing_at(subject, step)), replay.until(step - 1):
            frames = generate(subject.model, job.prompt, subject.arguments, job.seed).frames
        moved = float(np.square(frames.astype(np.float64) - dense).sum())
        scored = sum(float(noted[key].module[step, 0]) for key in subject.layers())
        factors.append(np.log(max(moved, 1e-12) / max(scored, 1e-30)))
    return np.exp(np.interp(np.arange(steps), probed, factors))


def reusing_at(subject: Subject, step: int) -> Recipe:
    """All self-attention that is searched answers with its last output at one step."""
    row = "C" * step + "r" + "C" * (len(subject.levels) - step - 1)
    sites = [
        site if component == "transformer" else f"{component}.{site}" for component, site in subject.layers()
    ]
    return Recipe.from_dict(
        {
            "schema": 1,
            "made_for": {**subject.made_for, "steps": len(row)},
            "choices": {"C": {"method": "compute"}, "r": {"method": "reuse", "max_age": 1}},
            "timeline": {"both": dict.fromkeys(sites, row)},
        },
        name="probe",
    )


def look_at_attention(subject: Subject) -> dict[Key, list[Channels]]:
    """For each layer and step the weights of its outputs' channels, from backwards at a few noise levels."""
    steps, job = len(subject.levels), subject.jobs[0]
    modules = denoisers_of(subject.model)
    with recording(modules, looked_at(steps), subject.family.guidance == "batched") as calls:
        generate(subject.model, job.prompt, subject.arguments, job.seed)
    found: dict[Key, list[Channels]] = {}
    for component, made in calls.items():
        sites = [site for name, site in subject.all_attention() if name == component]
        known = sensitivities(modules[component], sites, made)
        for site in sites:
            looks: dict[int, list[Channels]] = {}
            for (name, _, step), channels in known.items():
                if name == site:
                    looks.setdefault(step, []).append(channels)
            means = {
                step: tuple(np.mean(x, axis=0) for x in zip(*each, strict=True))
                for step, each in looks.items()
            }
            found[component, site] = between(means, steps)
    return found


def felt_by(attention: nn.Module, channels: Channels, guidance: float) -> Felt:
    """The weights of an attention's heads, from those of its outputs' channels."""
    visual: Any = attention.to_out
    own: Any = getattr(attention, "to_add_out", None)
    text = None
    if len(channels) > 1:
        text = _stream(visual[0] if own is None else own, channels[1])
    return Felt(_stream(visual[0], channels[0]), text, guidance)


def _stream(projection: nn.Linear, channels: np.ndarray) -> Stream:
    weight = projection.weight.detach().double().cpu()  # [C, H d]
    scaled = weight * torch.from_numpy(channels).sqrt()[:, None]
    return Stream(scaled.T @ scaled)


def score(
    subject: Subject, menu: Sequence[Candidate], ages: int, felt: Mapping[Key, Sequence[Channels]],
    job: Job, recipe: Recipe | None = None, told: Told | None = None,
) -> dict[Key, Noted]:  # fmt: skip
    """Score one generation of a prompt, dense or along a recipe."""
    modules, layers = denoisers_of(subject.model), {}
    guidance = guidance_of(subject.model, subject.family, subject.arguments)
    rows = Rows.drawn(math.prod(subject.grid))
    for key in subject.all_attention():
        attention: Any = modules[key[0]].get_submodule(key[1])
        own = menu if key in subject.layers() else ()  # near sets are of self-attention
        noted = Noted.empty(own, len(subject.levels), ages, attention.heads)
        weights = [felt_by(attention, channels, guidance) for channels in felt[key]]
        layers[key] = Layer(own, ages, weights, noted, rows)

    def run() -> None:
        generate(subject.model, job.prompt, subject.arguments, job.seed, told)

    run_scored(subject.model.pipe, modules, layers, subject.levels, run, recipe)
    return {key: layer.noted for key, layer in layers.items()}
