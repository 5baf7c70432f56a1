"""The calls that a pipeline makes of its denoisers: arguments by name, and the step that each belongs to."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]  # of a denoiser's forward, by name


def by_name(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments of a module's forward, however they were given."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class Steps:
    """Counts the steps of one run: a timestep that differs from the last begins the next.

    Two denoisers of a pipeline, and the branches of a guided one, are called at one timestep in turn.
    """

    def __init__(self) -> None:
        self.timestep: float | None = None
        self.step = -1
        self.began = False  # whether the last call was the first of its step

    def of(self, arguments: Mapping[str, Any]) -> int:
        """The step of a call."""
        timestep: Tensor = arguments["timestep"]
        value = float(timestep.flatten()[0])
        self.began = value != self.timestep
        self.step += self.began
        self.timestep = value
        return self.step
