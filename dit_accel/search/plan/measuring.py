"""How attention errors are felt, looked at once, and the scored run of a calibration prompt."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dit_accel.compare import Job
from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.felt import Felt, Rows, Stream
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.scores import Layer, run_scored, sampled
from dit_accel.search.plan.sensitivity import Channels, between, looked_at, recording, sensitivities
from dit_accel.search.subject import Subject, denoisers_of
from dit_accel.search.trajectory import guidance_of

Told = Callable[[int, int], None]


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
