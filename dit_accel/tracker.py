"""Where the denoising loop is: run, step and CFG branch, read from what diffusers shows, never by counting.

Step: the cache context, else `scheduler.step_index`, else the position of the timestep in the schedule.
Run: a new `scheduler.timesteps` object, or a step that goes back.
Branch: the cache context, else the order of the calls in a step; a batched pair is recognised by its data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel import compat

_NAMES = {"cond": "cond", "pred_cond": "cond", "uncond": "uncond", "pred_uncond": "uncond"}
_CALL_ORDER = ("cond", "uncond")


def _unguided(pipe: Any) -> bool:
    """Whether the pipeline shows that it runs without guidance; PixArt shows nothing."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    scale = getattr(pipe, "guidance_scale", None) if guided is None else None
    return guided is False or (isinstance(scale, int | float) and scale <= 1)


@dataclass(frozen=True)
class Position:
    """One forward of one denoiser."""

    step: int  # index into the schedule, 0 is the noisiest; -1 outside any known schedule
    branch: str  # "cond", "uncond", "both" (batched, [uncond, cond]) or "other"
    new_run: bool


@dataclass
class Tracker:
    """Follows one scheduler; feed it every forward."""

    levels: tuple[float, ...] = ()
    runs: int = 0
    _timesteps: Tensor | None = None
    _values: list[float] = field(default_factory=list)
    _train_steps: int = 1000
    _step: int = -1
    _seen: list[str] = field(default_factory=list)  # denoisers called at this step, one entry a call
    _paired: dict[int, bool] = field(default_factory=dict)  # batch size -> whether its halves are a CFG pair
    _confirmed: set[int] = field(default_factory=set)

    def advance(
        self, pipe: Any, component: str, guidance: str, context: tuple[str, int | None] | None,
        inputs: Mapping[str, Any],
    ) -> Position:  # fmt: skip
        """The position of the forward that is about to run."""
        scheduler = getattr(pipe, "scheduler", None)
        new_run = self._adopt(scheduler)
        step = self._find_step(scheduler, context, inputs)
        if step < self._step and step >= 0 and not new_run:
            new_run = True
            self.runs += 1
            self._forget()
        if step != self._step:
            self._step, self._seen = step, []
        branch = self._find_branch(pipe, guidance, context, inputs["hidden_states"])
        self._seen.append(component)
        return Position(step, branch, new_run)

    def forget_schedule(self) -> None:
        """Make the next forward the start of a new run."""
        self._timesteps = None

    def _forget(self) -> None:
        self._step, self._seen = -1, []
        self._paired, self._confirmed = {}, set()

    def _adopt(self, scheduler: Any) -> bool:
        """Whether the scheduler shows unseen timesteps: every `set_timesteps` makes a new tensor."""
        timesteps = getattr(scheduler, "timesteps", None)
        if getattr(scheduler, "num_inference_steps", None) is None or not isinstance(timesteps, Tensor):
            timesteps = None
        if timesteps is not None and timesteps is self._timesteps:
            return False
        first = self._timesteps is not None or timesteps is not None or self.runs == 0
        self._timesteps = timesteps
        self.levels = () if timesteps is None else compat.noise_levels(scheduler, timesteps)
        self._values = [] if timesteps is None else [float(t) for t in timesteps]
        self._train_steps = 1000 if timesteps is None else scheduler.config.get("num_train_timesteps", 1000)
        self.runs += int(first)
        self._forget()
        return first

    def _find_step(
        self, scheduler: Any, context: tuple[str, int | None] | None, inputs: Mapping[str, Any]
    ) -> int:
        if not self.levels:
            return -1
        step = context[1] if context is not None else None
        if step is None:
            step = getattr(scheduler, "step_index", None)
        if step is None:
            step = self._step_of_timestep(inputs["timestep"])
        return step if step < len(self.levels) else -1

    def _step_of_timestep(self, timestep: Any) -> int:
        """The nearest step of the schedule; models take t as it is or divided by the training steps."""
        value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        if value <= 1 < max(self._values):
            value *= self._train_steps
        distances = [abs(value - known) for known in self._values]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        return nearest if distances[nearest] <= 0.01 * self._train_steps else -1

    def _find_branch(
        self, pipe: Any, guidance: str, context: tuple[str, int | None] | None, latents: Tensor
    ) -> str:
        if context is not None and context[0] in _NAMES:
            return _NAMES[context[0]]
        if guidance == "batched":
            return "both" if self._is_pair(pipe, latents) else ("cond" if not self._seen else "other")
        return _CALL_ORDER[len(self._seen)] if len(self._seen) < len(_CALL_ORDER) else "other"

    def _is_pair(self, pipe: Any, latents: Tensor) -> bool:
        """Whether the batch is [uncond, cond] of the same latents; checked at two steps, then believed."""
        batch = latents.shape[0]
        if batch % 2 or _unguided(pipe):
            return False
        if self._paired.get(batch) is False or batch in self._confirmed:
            return self._paired[batch]
        equal = torch.equal(latents[: batch // 2], latents[batch // 2 :])
        if batch in self._paired:
            self._confirmed.add(batch)
        self._paired[batch] = equal
        return equal
