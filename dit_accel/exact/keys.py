"""Names of rows: the exact bits of a timestep, never a rounded or nearest value."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor; waits for its device."""
    # an expanded tensor of one element counts as contiguous, with a stride that no view of bytes takes
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).cpu().numpy().tobytes()


def at_hand(tensor: Tensor) -> bool:
    """Whether reading its bits waits for no device."""
    return tensor.device.type == "cpu"


def name_of(timestep: Tensor) -> bytes:
    """The bits of the one timestep of a batch [B], or of all of them where they differ."""
    whole = bits(timestep)
    first = whole[: timestep.element_size()]
    return first if whole == first * timestep.numel() else whole


@dataclass(frozen=True)
class Schedule:
    """What the timestep argument will be at every step of a run."""

    values: Tensor  # [steps], on the argument's device and in its dtype
    names: tuple[bytes, ...]

    def differs(self, step: int, timestep: Tensor) -> Tensor:
        """Whether an argument [B] is not what was foreseen: a tensor on its device, not waited for."""
        integer = _INTEGERS[timestep.element_size()]
        return (timestep.view(integer) != self.values[step].view(integer)).any()


def foresee(scheduler: Any, timestep: Tensor, step: int) -> Schedule | None:
    """The arguments of all steps, from the one of this step [B]; None where the scheduler does not tell.

    Pipelines pass the scheduler's timestep as it is or divided by the training steps, in the latents' dtype;
    the same division on the same device gives the same bits. A rule that misses this step's bits is dropped.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or not 0 <= step < len(timesteps):
        return None
    cast = timesteps.detach().to(timestep.device, timestep.dtype)
    train = scheduler.config.get("num_train_timesteps", 1000)
    wanted, size = name_of(timestep), timestep.element_size()
    for values in (cast, cast / train):
        if values.dtype != timestep.dtype:
            continue
        whole = bits(values)
        names = tuple(whole[at : at + size] for at in range(0, len(whole), size))
        if names[step] == wanted:
            return Schedule(values, names)
    return None
