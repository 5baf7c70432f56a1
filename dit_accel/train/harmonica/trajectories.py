"""Trajectories of the student: its sampler's steps under a router, what they err by, and their results.

Source: step-wise denoising training (SDT) of HarmoniCa, Huang et al. 2024, arXiv:2410.01723, section 4.2:
the student samples with the pipeline's own scheduler and guidance; at each step but the first the teacher,
the same model computing everything, answers to the same latents. No data set and no decoder is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.compare import Job
from dit_accel.families.base import Family
from dit_accel.loading import Model
from dit_accel.train.harmonica.rollout import Call, roll
from dit_accel.train.harmonica.router import Router
from dit_accel.train.harmonica.student import Student

Gates = Callable[[int], Tensor]  # step -> [columns, sites], or [columns, sites, choices]
Outputs = dict[tuple[int, tuple[str, ...]], Tensor]  # (step, branches) -> the denoiser's output
OfStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, student's, teacher's guided output) -> its error
DENSE = None  # in the place of gates: the model as it is


class Trajectories:
    """A frozen model whose student is attached."""

    def __init__(self, model: Model, family: Family, student: Student, arguments: Mapping[str, Any]):
        self.model, self.family, self.student, self.arguments = model, family, student, dict(arguments)

    def train(self, router: Router, gates: Gates, job: Job, error: OfStep) -> dict[int, Tensor]:
        """One trajectory; the slope of each step's error by its gates, for the steps after the first.

        The gradient ends at the step: what is stored and the latents carry none. As nothing is updated on
        the way, steps are independent of each other, whatever optimizer takes what is found.
        """
        slopes: dict[int, Tensor] = {}
        leaves: dict[int, Tensor] = {}

        def answer(call: Call) -> Tensor:
            if call.step == 0:
                return self._student(router, gates(0), call)
            if call.step not in leaves:
                leaves[call.step] = gates(call.step).detach().requires_grad_(True)
            with torch.no_grad():  # after the first branch's call they are on
                teacher = call.forward()
            with torch.enable_grad():
                own = self._student(router, leaves[call.step], call)
                parts = len(call.branches)
                pairs = zip(own.chunk(parts), teacher.chunk(parts), strict=True)
                return torch.cat([each for pair in pairs for each in pair])

        def advance(step: int, output: Tensor) -> Tensor:
            if step == 0:
                return output
            own, teacher = output.chunk(2)
            (slopes[step],) = torch.autograd.grad(error(step, own, teacher.detach()), leaves.pop(step))
            return own

        self.student.forget()
        roll(self.model, self.family, job, self.arguments, answer, advance)
        return slopes

    def latents(
        self, router: Router, gates: Callable[[int], Tensor | None], job: Job,
        known: Outputs | None = None, before: int = 0,
    ) -> tuple[Tensor, Outputs]:  # fmt: skip
        """The final latents, and all outputs on the way, under `gates` (DENSE: the model as it is).

        Outputs of steps under `before` are taken from `known`. What is stored at first is the student's as
        it was left if `known` is given, else nothing.
        """
        outputs: Outputs = {}

        def answer(call: Call) -> Tensor:
            given = gates(call.step)
            if call.step < before and known is not None:
                found = known[call.step, call.branches]
            elif given is None:
                found = call.forward()
            else:
                found = self._student(router, given, call)
            outputs[call.step, call.branches] = found
            return found

        if known is None:
            self.student.forget()
        return roll(self.model, self.family, job, self.arguments, answer), outputs

    def _student(self, router: Router, gates: Tensor, call: Call) -> Tensor:
        by_branch = {branch: gates[router.column(branch)] for branch in call.branches}
        with self.student.gated(by_branch, call.level):
            return call.forward()
