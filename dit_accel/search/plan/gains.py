"""How much more an error at a layer really moves the velocity than its score says.

Scores weigh errors as if they were noise, token by token. Real ones are alike over many tokens, and early
layers pass such errors on 10 to 25 dB stronger (measured on `toys/wan`), by much the same factor for reuse,
tails, residuals and bricks. So at a few steps every layer reuses its last output alone, in a real forward
from its block on, and what the velocity moved by is divided by what was scored.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dit_accel import api, plan
from dit_accel.compare import Job
from dit_accel.generate import generate
from dit_accel.plan import Key, Plan
from dit_accel.recipe import Recipe
from dit_accel.search.calls import Arguments, Steps
from dit_accel.search.forwards import Forwards, tensor_of
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.probes import reusing_at
from dit_accel.search.plan.sensitivity import looked_at
from dit_accel.search.subject import Subject, denoisers_of
from dit_accel.search.trajectory import guidance_of
from dit_accel.session import Session

Moved = dict[tuple[Key, int], float]  # (layer, step) -> |change of v|^2


def measure(subject: Subject, job: Job, noted: Mapping[Key, Noted]) -> dict[Key, np.ndarray]:
    """[T] for each layer: squared errors of the velocity, real over scored, along one dense generation.

    1 where nothing could be compared: a layer whose output never changes, or one that may only compute.
    """
    steps = len(subject.levels)
    looks = _looks(steps)
    moved = _moved(subject, job, looks)
    found = {}
    for key in subject.all_attention():
        # of two denoisers each runs at its own steps alone
        ratios = {
            step: moved[key, step] / noted[key].module[step, 0]
            for step in looks
            if moved.get((key, step), 0.0) > 0 and 0 < noted[key].module[step, 0] < math.inf
        }
        known = np.log(list(ratios.values()) or [1.0])
        found[key] = np.exp(np.interp(np.arange(steps), list(ratios) or [0], known))
    return found


def _looks(steps: int) -> list[int]:
    """Steps looked at, never two in a row: what the first stores for the second it would read itself."""
    found = [1]
    for step in looked_at(steps):
        if step >= found[-1] + 2:
            found.append(step)
    return found


def _moved(subject: Subject, job: Job, looks: Collection[int]) -> Moved:
    modules = denoisers_of(subject.model)
    guidance = guidance_of(subject.model, subject.family, subject.arguments)
    whole = reusing_at(subject, 1, subject.all_attention())  # installs what any of its plans needs
    with api.accelerated(subject.model.pipe, whole) as handle:
        looker = _Looker(subject, handle.session, frozenset(looks), guidance)
        looker.forwards = Forwards(handle.session, modules, looker.answer)
        with looker.forwards.watching():
            generate(subject.model, job.prompt, subject.arguments, job.seed)
    return looker.moved


@dataclass
class _Looker:
    """Answers the pipeline with dense forwards, and repeats those of some steps layer by layer."""

    subject: Subject
    session: Session
    looks: frozenset[int]
    guidance: float
    moved: Moved = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    of_cond: dict[Key, Tensor] = field(default_factory=dict[Key, Tensor])
    forwards: Forwards = field(init=False)

    def answer(self, component: str, arguments: Arguments) -> Any:
        """One call of the pipeline."""
        step, keys = self.steps.of(arguments), self.subject.all_attention()
        if self.steps.began:
            self.of_cond = {}
        # what the next step reuses is stored by the dense forward of this one
        keeping = reusing_at(self.subject, step + 1, keys) if step + 1 in self.looks else Recipe.neutral()
        ran = self.forwards.run(component, {"": arguments}, self._plan(keeping))
        if step in self.looks:
            blocks = self.session.denoisers[component].blocks
            for key in keys:
                if key[0] == component:
                    changed = self._plan(reusing_at(self.subject, step, [key]))
                    first = next(n for n, block in enumerate(blocks) if key[1].startswith(f"{block}."))
                    again = self.forwards.run(component, {"": arguments}, changed, first, ran.entered)
                    self._note(key, step, arguments, ran.outputs[""], again.outputs[""])
        return ran.outputs[""]

    def _plan(self, recipe: Recipe) -> Plan:
        return plan.resolve(recipe, tuple(self.session.denoisers.values()), self.subject.levels)

    def _note(self, key: Key, step: int, arguments: Arguments, dense: Any, changed: Any) -> None:
        """What a layer moved the velocity by: with cond's and uncond's part, v = u + g (c - u)."""
        latent, moved = arguments["hidden_states"], tensor_of(changed).double() - tensor_of(dense).double()
        if moved.ndim == latent.ndim >= 4:
            moved = moved[:, : latent.shape[1]]  # without a learned variance
        if self.subject.family.guidance == "batched":
            uncond, cond = moved.chunk(2)
        elif key not in self.of_cond:
            self.of_cond[key] = moved
            return
        else:
            uncond, cond = moved, self.of_cond[key]
        whole = self.guidance * cond + (1 - self.guidance) * uncond
        self.moved[key, step] = float(whole.square().sum()) / len(whole)
