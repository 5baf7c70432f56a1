"""A call of a pipeline, with its own scheduler and guidance, whose denoiser is answered by somebody else.

What a denoiser's call gets may be of a larger batch than it was asked for: the pipeline's own guidance then
guides every part of it, with gradients where it has them, and `advance` says which part goes on.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.families.base import Family
from dit_accel.loading import Model
from dit_accel.search.calls import by_name
from dit_accel.search.forwards import tensor_of
from dit_accel.search.subject import call_of
from dit_accel.stages import stages
from dit_accel.tracker import Tracker

NAME = "dit_accel_rollout"


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: `branches` are those of its batch, [uncond, cond] or one."""

    step: int
    level: float
    branches: tuple[str, ...]
    forward: Callable[[], Tensor]


Answer = Callable[[Call], Tensor]
Advance = Callable[[int, Tensor], Tensor]  # (step, guided output) -> what the scheduler goes on with


def roll(
    model: Model, family: Family, job: Job, arguments: Mapping[str, Any], answer: Answer,
    advance: Advance | None = None,
) -> Tensor:  # fmt: skip
    """The final latents of one call of the pipeline; `advance` runs with gradients."""
    pipe, hook = model.pipe, _Taken(model.pipe, family, answer)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(hook, NAME)
    scheduler, step_of = pipe.scheduler, pipe.scheduler.step

    @functools.wraps(step_of)  # pipelines ask its signature what it takes: a generator, eta
    def step(*args: Any, **kwargs: Any) -> Any:
        output = kwargs.pop("model_output") if "model_output" in kwargs else args[0]
        if advance is not None:
            output = advance(hook.step, output)
        torch.set_grad_enabled(False)
        return step_of(output.detach(), *args[1:], **kwargs)

    grads = torch.is_grad_enabled()
    shadowed = scheduler.__dict__.get("step")
    scheduler.step = step
    try:
        with stages(pipe), torch.no_grad():
            return pipe(**call_of([job], arguments), output_type="latent")[0]
    finally:
        torch.set_grad_enabled(grads)
        del scheduler.step
        if shadowed is not None:
            scheduler.step = shadowed
        registry.remove_hook(NAME, recurse=False)


class _Taken(ModelHook):
    """Stands in for the denoiser's forward."""

    def __init__(self, pipe: Any, family: Family, answer: Answer):
        super().__init__()
        self.pipe, self.family, self.answer = pipe, family, answer
        self.tracker, self.step = Tracker(), -1

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = by_name(module, args, kwargs)
        at = self.tracker.advance(self.pipe, "transformer", self.family.guidance, None, inputs)
        self.step = at.step
        if at.step < 0 or at.branch == "other":
            raise BadUsage(
                f"asked to follow {type(self.pipe).__name__}; its denoiser was called outside of its "
                "schedule or a third time at a step. Such a pipeline cannot be trained along."
            )
        original = self.fn_ref.original_forward
        assert original is not None

        def forward() -> Tensor:
            return tensor_of(original(*args, **kwargs))

        branches = ("uncond", "cond") if at.branch == "both" else (at.branch,)
        found = self.answer(Call(at.step, self.tracker.levels[at.step], branches, forward))
        if found.requires_grad:
            torch.set_grad_enabled(True)  # the pipeline's guidance is part of the graph; `step` ends it
        return Transformer2DModelOutput(sample=found) if kwargs.get("return_dict", True) else (found,)
