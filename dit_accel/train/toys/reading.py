"""Teaches the text encoder to read, from captions alone, before the transformer learns to draw what it says.

Real pipelines start from a text encoder that reads already. Trained only through the picture's loss, a toy's
never came to tell which shape or motion belongs to which colour: a linear map of a colour's word read the
shape of its thing as often as by chance (0.3 of 4), and scenes of two things mixed them up.
"""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dit_accel.scenes import Scene
from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.toys.attributes import CHOICES, classes_of, errors_of
from dit_accel.train.toys.data import training_scene
from dit_accel.train.toys.denoiser import load_start
from dit_accel.train.toys.models import Denoiser, build_denoiser
from dit_accel.train.toys.text import TEXT_WIDTH, Prompts

BATCH = 128
UNSAID = -100  # the class that cross-entropy leaves out


def words_of_things(scene: Scene, causal: bool = False) -> list[tuple[int, int, int, int]]:
    """For each word about a thing: its place in the caption, then its thing's colour, shape and motion.

    Where `causal` a word stands for what has been said by then: attributes to come are `UNSAID`.
    """
    rows, place = [], 0
    for thing in scene.things:
        words, classes = str(thing).split(), classes_of(thing)  # "a red ring moving left"
        first = (1, 2, len(words) - 1)  # the word that tells each attribute; the last one tells the motion
        for at in range(1, len(words)):
            said = (
                UNSAID if causal and at < word else each for word, each in zip(first, classes, strict=True)
            )
            rows.append((place + at, *said))
        place += len(words) + 1  # "and"
    return rows


class Reading:
    """The loss: from every word of a thing a linear map must read the thing's colour, shape and motion.

    `keep` weighs how far the encoder's output may leave the one it starts with, which the transformer knows.
    """

    def __init__(self, toy: str, denoiser: Denoiser, keep: float):
        self.prompts = Prompts(toy, denoiser.text_encoder)
        self.known = Prompts(toy, copy.deepcopy(denoiser.text_encoder).requires_grad_(False))
        self.moving, self.keep = toy == "wan", keep

    def loss(self, denoiser: nn.Module, scenes: list[Scene]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropies of the three attributes, summed, plus the distance to the output known so far."""
        captions = [str(scene) for scene in scenes]
        text, mask = self.prompts(captions)
        rows = [
            (number, *row)
            for number, scene in enumerate(scenes)
            for row in words_of_things(scene, self.prompts.causal)
        ]
        number, place, *classes = torch.tensor(rows, device=text.device).T
        asked = torch.stack(classes, 1)
        errors = errors_of(denoiser.reader(text[number, place]), asked).sum(0) / (asked != UNSAID).sum(0)
        self.known.text_encoder.to(text.device)
        moved = ((text - self.known(captions)[0]).square() * mask[..., None]).mean()
        numbers = dict(zip(("colour", "shape", "motion"), errors.tolist(), strict=True))
        return errors.sum() + self.keep * moved, numbers | {"moved": moved.item()}


def train_reading(toy: str, config: LoopConfig, start: Path | None = None, keep: float = 0.1) -> Denoiser:
    """Trains `toy`'s text encoder alone; the transformer in the folder is that of `start`, untouched."""
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(toy)
    if start is not None:
        load_start(denoiser, start)
    reading = Reading(toy, denoiser, keep=keep if start is not None else 0.0)
    denoiser.reader = nn.Linear(TEXT_WIDTH, sum(CHOICES))

    def loss_of(module: nn.Module, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([config.seed, number])
        return reading.loss(module, [training_scene(rng, reading.moving)[0] for _ in range(BATCH)])

    train(denoiser, loss_of, replace(config, precision="no"))
    return denoiser
