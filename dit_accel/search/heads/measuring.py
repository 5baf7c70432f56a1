"""The measurements behind a plan: how errors travel, what every choice costs.

For each calibration prompt: one scored run, and runs that reuse at single steps, which tell what an error
of the velocity makes of the frames. How attentions are felt is looked at once, on the first prompt.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
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
from dit_accel.search.heads.scores import Layer, run_scored, sampled
from dit_accel.search.heads.sensitivity import Channels, between, looked_at, recording, sensitivities
from dit_accel.search.subject import Subject, denoisers_of
from dit_accel.search.trajectory import guidance_of

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
        with api.accelerated(subject.model.pipe, reusing_at(subject, step, backend)), replay.until(step - 1):
            frames = generate(subject.model, job.prompt, subject.arguments, job.seed).frames
        moved = float(np.square(frames.astype(np.float64) - dense).sum())
        scored = sum(float(noted[key].module[step, 0]) for key in subject.layers())
        factors.append(np.log(max(moved, 1e-12) / max(scored, 1e-30)))
    return np.exp(np.interp(np.arange(steps), probed, factors))


def reusing_at(subject: Subject, step: int, backend: Collection[Key] = ()) -> Recipe:
    """All self-attention that is searched answers with its last output at one step.

    At the others that of `backend` runs through the fastest one: as exact, and faster.
    """
    row = "C" * step + "r" + "C" * (len(subject.levels) - step - 1)
    tables: dict[str, Any] = {"timeline": {"both": {_site(key): row for key in subject.layers()}}}
    if backend:
        tables |= {"attention": {"both": {_site(key): ["F"] for key in backend}}}
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


def _site(key: Key) -> str:
    return key[1] if key[0] == "transformer" else f"{key[0]}.{key[1]}"


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
    for layer in layers.values():
        layer.noted.fill(sampled(len(subject.levels)))
    return {key: layer.noted for key, layer in layers.items()}
