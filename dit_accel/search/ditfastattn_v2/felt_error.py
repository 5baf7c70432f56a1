"""How wrong a head's output is in what comes out: errors of all layers and steps in one currency.

Ours, by the measurements of the plan search. An error e of a head is weighed as the output projection, the
layers after it and the steps after this one let it through: a share of the mean squared error of the frames.
With guidance g the sampler takes v = u + g (c - u), so errors of the branches add up to g e_c + (1 - g) e_u:
where uncond follows what cond did they cancel but for e, where only one errs g^2 or (g - 1)^2 times as much
is felt. Cond decides first and reckons with the former; uncond knows what cond did.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.search.plan import gains, measuring, probes
from dit_accel.search.plan.felt import Felt
from dit_accel.search.subject import Subject
from dit_accel.search.trajectory import guidance_of


@dataclass(frozen=True)
class FeltError:
    """Of one layer: weights of its heads' errors, and what an error at a step comes to in the frames [T]."""

    felt: Sequence[Felt]
    scale: np.ndarray

    def of_cond(self, step: int, visual: Tensor, text: Tensor) -> np.ndarray:
        """[H]: of what is wrong [B, n, H, d] with cond's rows, if uncond follows."""
        felt = self.felt[step]
        found = felt.visual.of_heads(visual)
        if text.shape[1]:
            found = found + felt.guidance**2 * (felt.text or felt.visual).of_heads(text)
        return found * self.scale[step]

    def of_uncond(self, step: int, visual: Tensor, text: Tensor, of_cond: Tensor | None) -> np.ndarray:
        """[H]: of what is wrong with uncond's rows, where cond's visual rows are wrong by `of_cond`."""
        felt = self.felt[step]
        g = felt.guidance
        both = (1 - g) * visual if of_cond is None else g * of_cond + (1 - g) * visual
        found = felt.visual.of_heads(both)
        if text.shape[1]:
            found = found + (1 - g) ** 2 * (felt.text or felt.visual).of_heads(text)
        return found * self.scale[step]


def measure(subject: Subject) -> Mapping[Key, FeltError]:
    """The weights of every layer, from runs of the calibration prompts one by one.

    Raises BadUsage without guidance.
    """
    guidance = guidance_of(subject.model, subject.family, subject.arguments)
    channels = measuring.look_at_attention(subject)
    first, weights = subject.jobs[0], []
    noted: Any = None
    factors: Mapping[Key, np.ndarray] = {}
    for job in subject.jobs:
        noted = measuring.score(subject, (), 1, channels, job)
        factors = factors or gains.measure(subject, first, noted)
        for key, factor in factors.items():
            noted[key].scale(factor)
        weights.append(probes.step_weights(subject, job, noted))
    frames = generate(subject.model, first.prompt, subject.arguments, first.seed).frames
    mean = np.mean(weights, axis=0) / frames.size
    return {
        key: FeltError(
            [measuring.felt_by(subject.attention(key), each, guidance) for each in channels[key]],
            mean * factors[key],
        )
        for key in subject.layers()
    }
