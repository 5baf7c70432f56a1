"""The toys' language: a closed vocabulary, sampling, captions, and captions parsed back into scenes."""

import zlib
from dataclasses import dataclass

import numpy as np

from dit_accel.errors import ToyError, nearest

# 8-bit RGB; every two object colours are at least 120 apart, so that a VAE's blur cannot swap them
COLOURS = {
    "red": (226, 44, 44),
    "green": (52, 200, 72),
    "blue": (58, 108, 240),
    "yellow": (240, 214, 52),
    "magenta": (222, 66, 214),
    "white": (240, 240, 240),
}
BACKGROUNDS = {"charcoal": (48, 48, 52), "navy": (18, 30, 92), "maroon": (92, 18, 34), "forest": (14, 76, 38)}
SHAPES = ("disc", "ring", "square", "triangle")
TEXTURES = ("plain", "striped", "checked")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
PACES = ("moving", "darting")
MOTIONS = ("still", *(f"{pace} {way}" for pace in PACES for way in DIRECTIONS))
MOST_THINGS = 2  # that a scene has
WORDS = tuple(
    dict.fromkeys(
        [
            "a",
            "and",
            "on",
            "background",
            *COLOURS,
            *SHAPES,
            *BACKGROUNDS,
            *TEXTURES,
            "still",
            *PACES,
            *DIRECTIONS,
        ]
    )
)


@dataclass(frozen=True)
class Thing:
    """One object. `motion` is one of `MOTIONS`, or None in a picture's caption, which tells no motion."""

    colour: str
    shape: str
    motion: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, ("a", self.colour, self.shape, self.motion)))


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two things of different colours on a background."""

    things: tuple[Thing, ...]
    background: str
    texture: str

    def __str__(self) -> str:
        return f"{' and '.join(map(str, self.things))} on a {self.background} {self.texture} background"


def sample_scene(rng: np.random.Generator, moving: bool, count: int | None = None) -> Scene:
    """A random scene of `count` things (one in three scenes has one, the others `MOST_THINGS`)."""
    count = count or (1 if rng.random() < 1 / 3 else MOST_THINGS)
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    # half of the things keep still or move evenly and half dart, whatever the number of words for each
    motions = [_sample_motion(rng) if moving else None for _ in range(count)]
    things = tuple(
        Thing(str(colour), str(rng.choice(SHAPES)), motion)
        for colour, motion in zip(colours, motions, strict=True)
    )
    return Scene(things, str(rng.choice(list(BACKGROUNDS))), str(rng.choice(TEXTURES)))


def _sample_motion(rng: np.random.Generator) -> str:
    pace = str(rng.choice(["still", "moving", "darting"], p=[0.2, 0.4, 0.4]))
    return pace if pace == "still" else f"{pace} {rng.choice(list(DIRECTIONS))}"


def is_held_out(caption: str) -> bool:
    """True for one caption in sixteen: training never sees these, evaluation uses no others."""
    return zlib.crc32(str(caption).encode()) % 16 == 0


def parse(caption: str) -> Scene:
    """The scene a caption describes; `ToyError` when it is not a sentence of the toys' language."""
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ToyError(
            f"caption {caption!r}: the word {unknown[0]!r} is not in the toys' vocabulary; "
            f"nearest: {nearest(unknown[0], WORDS)}"
        )
    head, _, tail = " ".join(words).rpartition(" on a ")
    ground = tail.split()
    if (
        len(ground) != 3
        or ground[0] not in BACKGROUNDS
        or ground[1] not in TEXTURES
        or ground[2] != "background"
    ):
        raise _not_a_sentence(caption)
    return Scene(tuple(_parse_thing(part, caption) for part in head.split(" and ")), ground[0], ground[1])


def _parse_thing(text: str, caption: str) -> Thing:
    words = text.split()
    if len(words) < 3 or words[0] != "a" or words[1] not in COLOURS or words[2] not in SHAPES:
        raise _not_a_sentence(caption)
    motion = " ".join(words[3:]) or None
    if motion is not None and motion not in MOTIONS:
        raise _not_a_sentence(caption)
    return Thing(words[1], words[2], motion)


def _not_a_sentence(caption: str) -> ToyError:
    return ToyError(
        f"caption {caption!r} is not of the form "
        "'a COLOUR SHAPE [MOTION] [and ...] on a GROUND TEXTURE background'; "
        "for example 'a red ring moving left and a blue square still on a navy striped background'"
    )
