"""A thing's colour, shape and motion as classes, for the linear maps that must tell them during training."""

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel.scenes import Thing
from dit_accel.scenes.caption import COLOURS, MOTIONS, SHAPES

COLOUR_NAMES = tuple(COLOURS)
CHOICES = (len(COLOUR_NAMES), len(SHAPES), len(MOTIONS))


def classes_of(thing: Thing) -> tuple[int, int, int]:
    """Numbers of `thing`'s colour, shape and motion; a picture's things are still."""
    return (
        COLOUR_NAMES.index(thing.colour),
        SHAPES.index(thing.shape),
        MOTIONS.index(thing.motion or "still"),
    )


def errors_of(told: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropies `[N, 3]` of logits `[N, sum(CHOICES)]` against `classes` `[N, 3]`."""
    parts = zip(told.float().split(CHOICES, dim=1), classes.unbind(1), strict=True)
    return torch.stack([functional.cross_entropy(part, right, reduction="none") for part, right in parts], 1)
