"""Scenes that code can draw from a caption, and read back from pixels."""

from dit_accel.scenes.caption import MOST_THINGS, Scene, Thing, is_held_out, parse, sample_scene
from dit_accel.scenes.readback import attributes, score
from dit_accel.scenes.render import cover, render

__all__ = [
    "MOST_THINGS",
    "Scene",
    "Thing",
    "attributes",
    "cover",
    "is_held_out",
    "parse",
    "render",
    "sample_scene",
    "score",
]
