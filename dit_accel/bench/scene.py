"""What a rival is switched on for: a pipeline and the facts of the run that some of them must be told."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dit_accel.bench.work import denoisers_of
from dit_accel.families import Family


@dataclass(frozen=True)
class Scene:
    """One run of one pipeline."""

    pipe: Any
    family: Family
    steps: int
    guided: bool = True  # whether the run has an unconditional branch
    ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)  # calibrated, by denoiser
    undo: ExitStack = field(default_factory=ExitStack)  # runs when the rival is switched off

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The denoisers by pipeline attribute."""
        return denoisers_of(self.pipe, self.family)

    @property
    def opens_contexts(self) -> bool:
        """Whether the pipeline tells the hooks of diffusers which branch a forward belongs to."""
        return "cache_context" in inspect.unwrap(type(self.pipe).__call__).__code__.co_names


def guided(arguments: Mapping[str, Any], family: Family, pipe: Any) -> bool:
    """Whether a call with these arguments runs an unconditional branch."""
    parameter = inspect.signature(type(pipe).__call__).parameters[family.guidance_argument]
    return float(arguments.get(family.guidance_argument, parameter.default)) > 1
