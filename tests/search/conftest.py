"""Tiny pipelines of the real classes, at sizes where a window is not everything."""

from dataclasses import dataclass
from typing import Any

import pytest

from dit_accel import loading
from dit_accel.compare import Job
from dit_accel.registry import FAMILIES
from dit_accel.search.ditfastattn import search as ditfastattn
from dit_accel.testing import TINY
from dit_accel_kernels.block_attention import break_even

CALLS = {
    "pixart_sigma": {"height": 512, "width": 256, "guidance_scale": 4.0, "use_resolution_binning": False},
    "wan": {"height": 32, "width": 48, "num_frames": 13, "guidance_scale": 4.0},
    "cogvideox": {"height": 32, "width": 48, "num_frames": 9, "guidance_scale": 4.0},
    "qwen_image": {"height": 64, "width": 48, "true_cfg_scale": 4.0, "negative_prompt": "bad"},
}
JOBS = (Job("a red ring", 3), Job("a blue disc on a large field", 4))


@dataclass(frozen=True)
class Tiny:
    """A tiny model with the arguments of its call."""

    model: loading.Model
    arguments: dict[str, Any]

    def look(self, jobs=JOBS, **more: Any) -> ditfastattn.DiTFastAttn:
        return ditfastattn.look(self.model, jobs, self.arguments, **more)


def never() -> bool:
    return False


def decide(subject, delta, ended=never, saved=lambda: None, told=lambda done, total: None, decisions=None):
    """(recipe, decisions) of one search."""
    decisions = subject.decided() if decisions is None else decisions
    return subject.search(delta, decisions, ended, saved, told), decisions


@pytest.fixture(autouse=True)
def no_processor_decides(monkeypatch):
    """Whether windows are worth it is up to a machine's break-even densities; what is decided here is not."""
    monkeypatch.setattr(break_even, "density", lambda *given: None)


@pytest.fixture(scope="session")
def tiny():
    """Give a tiny model by its case."""

    def build(case: str, steps: int = 9, layers: int = 2, **more: Any) -> Tiny:
        pipe = TINY[case].build(complete=True, layers=layers)
        family = FAMILIES.get(type(pipe.transformer).__name__)
        arguments = {"num_inference_steps": steps, **CALLS[case], **more}
        return Tiny(loading.Model("tiny", pipe, family, {}, True), arguments)

    return build
