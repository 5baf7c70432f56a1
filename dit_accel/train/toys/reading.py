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
from torch.nn import functional

from dit_accel.scenes import Scene
from dit_accel.scenes.caption import COLOURS, MOTIONS, SHAPES
from dit_accel.train.toys.data import training_scene
from dit_accel.train.toys.denoiser import load_start
from dit_accel.train.toys.loop import LoopConfig, train
from dit_accel.train.toys.models import TEXT_WIDTH, Denoiser, build_denoiser, build_tokenizer

COLOUR_NAMES = tuple(COLOURS)
CHOICES = (len(COLOUR_NAMES), len(SHAPES), len(MOTIONS))
BATCH = 128


def words_of_things(scene: Scene) -> list[tuple[int, int, int, int]]:
    """For each word that describes a thing: its place in the caption, then its thing's colour, shape, motion."""
    rows, place = [], 0
    for thing in scene.things:
        labels = (
            COLOUR_NAMES.index(thing.colour),
            SHAPES.index(thing.shape),
            MOTIONS.index(thing.motion or "still"),
        )
        words = str(thing).split()  # "a red ring moving left"
        rows += [(place + at, *labels) for at in range(1, len(words))]
        place += len(words) + 1  # "and"
    return rows


class Reading:
    """The loss: from every word of a thing a linear map must read the thing's colour, shape and motion.

    `keep` weighs how far the encoder's output may leave the one it starts with, which the transformer knows.
    """

    def __init__(self, denoiser: Denoiser, moving: bool, keep: float):
        self.tokenizer = build_tokenizer()
        self.moving, self.keep = moving, keep
        self.known = copy.deepcopy(denoiser.text_encoder).requires_grad_(False)

    def loss(self, denoiser: nn.Module, scenes: list[Scene]) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropies of the three attributes, summed, plus the distance to the output known so far."""
        words = self.tokenizer([str(scene) for scene in scenes], padding="longest", return_tensors="pt")
        text = denoiser.text_encoder(words.input_ids, words.attention_mask).last_hidden_state
        rows = [(number, *row) for number, scene in enumerate(scenes) for row in words_of_things(scene)]
        number, place, *labels = torch.tensor(rows).T
        read = denoiser.reader(text[number, place]).split(CHOICES, dim=1)
        errors = [functional.cross_entropy(guess, label) for guess, label in zip(read, labels, strict=True)]
        known = self.known(words.input_ids, words.attention_mask).last_hidden_state
        moved = ((text - known).square() * words.attention_mask[..., None]).mean()
        numbers = dict(zip(("colour", "shape", "motion"), (error.item() for error in errors), strict=True))
        return sum(errors) + self.keep * moved, numbers | {"moved": moved.item()}


def train_reading(toy: str, config: LoopConfig, start: Path | None = None, keep: float = 0.1) -> Denoiser:
    """Trains `toy`'s text encoder alone; the transformer in the folder is that of `start`, untouched."""
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(toy)
    if start is not None:
        load_start(denoiser, start)
    reading = Reading(denoiser, moving=toy == "wan", keep=keep if start is not None else 0.0)
    denoiser.reader = nn.Linear(TEXT_WIDTH, sum(CHOICES))

    def loss_of(module: nn.Module, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = np.random.default_rng([config.seed, number])
        return reading.loss(module, [training_scene(rng, reading.moving)[0] for _ in range(BATCH)])

    train(denoiser, loss_of, replace(config, precision="no"))
    return denoiser
