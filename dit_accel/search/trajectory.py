"""What skipping visits would do to a sample, predicted from one dense run of it.

A dense run of T steps with guidance g gives the velocities c_t (cond) and u_t (uncond), and the sampler moves
by w_t (u_t + g (c_t - u_t)) with w_t = sigma_{t+1} - sigma_t. A skipped visit answers with an old output:

    reuse          c^_t = c_a
    share_branch   u^_t = c^_t + u_b - c_b     with the stored difference

where a and b are the last steps at which cond, and both, computed. If the other steps stay on the dense
trajectory the sample moves by

    E = sum_t w_t (g (c^_t - c_t) + (1 - g) (u^_t - u_t))

which costs no run of the model. Errors of neighbouring steps add up or cancel in it, as they do in a sample.
But later steps answer to earlier errors, and an error in the noise can move a whole picture: `calibrate` runs
the pipeline with single steps skipped and scales w_t by what came of it. Velocities are kept as sketches
(Charikar et al. 2002, Count Sketch), whose distances are those of the velocities to about 3 %.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import BadUsage
from dit_accel.families.base import Family
from dit_accel.generate import generate
from dit_accel.loading import Model

SKETCH = 1024  # numbers that stand for one velocity


@dataclass(frozen=True)
class Trajectory:
    """One dense run: `cond` and `uncond` are sketches `[T, SKETCH]`, `weight` is `[T]`."""

    cond: np.ndarray
    uncond: np.ndarray
    weight: np.ndarray
    guidance: float
    frames: np.ndarray | None = None  # [F, H, W, 3]

    def error(self, letters: Sequence[str]) -> float:
        """Norm of E for (cond, uncond) rows of C compute, r reuse, s shared; the first step computes both."""
        last_cond = difference = total = np.zeros(self.cond.shape[1])
        for step, (c, u) in enumerate(zip(*letters, strict=True)):
            if c == "C":
                last_cond = self.cond[step]
            if c == u == "C":
                difference = self.uncond[step] - self.cond[step]
            used = last_cond + difference if u == "s" else self.uncond[step]
            wrong = self.guidance * (last_cond - self.cond[step])
            wrong = wrong + (1 - self.guidance) * (used - self.uncond[step])
            total = total + self.weight[step] * wrong
        return float(np.linalg.norm(total))


def record(model: Model, prompt: str, seed: int, arguments: Mapping[str, Any]) -> Trajectory:
    """Runs the pipeline densely. Raises BadUsage without guidance, or where no velocity is predicted."""
    family, scheduler = family_of_model(model), model.pipe.scheduler
    guidance = guidance_of(model, family, arguments)
    outputs: list[Tensor] = []
    hook = model.pipe.transformer.register_forward_hook(
        lambda module, args, output: outputs.append(output[0].detach().double())
    )
    try:
        sample = generate(model, prompt, arguments, seed)
    finally:
        hook.remove()
    sigmas = getattr(scheduler, "sigmas", None)
    count = len(scheduler.timesteps)
    if family.guidance == "batched":
        outputs = [half for pair in outputs for half in reversed(pair.chunk(2))]
    if sigmas is None or len(sigmas) != count + 1 or len(outputs) != 2 * count:
        raise BadUsage(
            f"asked to predict what skipping costs with {type(scheduler).__name__}; found {len(outputs)} "
            f"outputs in {count} steps and {0 if sigmas is None else len(sigmas)} noise levels. "
            "Use a flow-matching scheduler with guidance that takes one evaluation of each branch per step."
        )
    sketches = np.stack([sketch(output) for output in outputs])
    weight = np.diff(np.asarray(sigmas, dtype=np.float64))
    return Trajectory(sketches[0::2], sketches[1::2], weight, guidance, sample.frames)


def calibrate(trajectory: Trajectory, skipped: Callable[[int], np.ndarray], every: int = 2) -> Trajectory:
    """The trajectory with weights that predict errors in the frames.

    `skipped(step)` gives the frames of a run that skips both branches at this step alone. Every so many steps
    are run, and the last; the factors of the others are interpolated in their logarithms.
    """
    steps = len(trajectory.weight)
    probed = sorted({*range(1, steps, every), steps - 1})
    factors = []
    for step in probed:
        rows = tuple("C" * step + letter + "C" * (steps - step - 1) for letter in "rs")
        moved = float(np.linalg.norm(skipped(step) - trajectory.frames))
        factors.append(np.log(max(moved, 1e-9) / max(trajectory.error(rows), 1e-12)))
    factor = np.exp(np.interp(np.arange(steps), probed, factors))
    return dataclasses.replace(trajectory, weight=trajectory.weight * factor)


def sketch(values: Tensor) -> np.ndarray:
    """`SKETCH` signed sums of all values: the same places and signs for every tensor of a size."""
    rng = np.random.default_rng(values.numel())
    places = torch.from_numpy(rng.integers(0, SKETCH, values.numel()))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], values.numel()))
    flat = values.flatten().cpu() * signs
    return torch.zeros(SKETCH, dtype=torch.float64).index_add_(0, places, flat).numpy()


def family_of_model(model: Model) -> Family:
    if model.family is None:
        raise BadUsage(
            f"asked for a search on {model.name}; {type(model.pipe).__name__} is of no known family. "
            "Register one with dit_accel.register_family."
        )
    return model.family


def guidance_of(model: Model, family: Family, arguments: Mapping[str, Any]) -> float:
    name = family.guidance_argument
    default = inspect.signature(model.pipe.__call__).parameters[name].default
    strength = float(arguments.get(name, default))
    if strength <= 1:
        raise BadUsage(
            f"asked for a search with {name}={strength}; without guidance there is one branch and nothing to "
            f"share. Give {name} above 1."
        )
    return strength
