"""The search over timelines: its candidates are legal, and it keeps the best that is fast enough."""

import numpy as np
import pytest

from dit_accel import api, loading, plan
from dit_accel.compare import Job
from dit_accel.families.wan import WAN
from dit_accel.generate import generate
from dit_accel.search.timelines import search as timeline
from dit_accel.search.timelines.search import search, skips_for
from dit_accel.sites import Denoiser
from dit_accel.testing import TINY
from tests.search.test_skips import random_trajectory

STEPS = 12


class Model:
    """What the search reads of a model."""

    name, family = "tiny", WAN

    class pipe:
        class transformer:
            get_submodule = staticmethod(lambda name: [0] * 4)


@pytest.mark.parametrize("skips", range(0, 2 * STEPS - 1))
def test_every_candidate_is_a_legal_plan(skips):
    recipe = timeline.recipe_of(timeline.choose([random_trajectory(STEPS)], skips), Model, 4, "stored", "x")
    blocks = tuple(f"blocks.{i}" for i in range(4))
    plan.check(recipe, (Denoiser("transformer", {}, {}, blocks),))
    rows = "".join(row for table in recipe.timeline.values() for row in table.values())
    assert len(rows) - rows.count("C") == skips


def test_skips_count_only_the_denoising():
    assert skips_for(2.0, 20, denoising=1.0) == 20
    assert skips_for(4 / 3, 20, denoising=0.5) == 20
    assert skips_for(1.0, 20, denoising=0.5) == 0
    assert skips_for(9.0, 20, denoising=0.5) == 38  # more than there is: all but the first step


def test_the_search_keeps_the_best_of_those_fast_enough(monkeypatch):
    class Measured:
        def __init__(self, recipe):
            rows = "".join(row for table in recipe.timeline.values() for row in table.values())
            self.work = rows.count("C") / len(rows)
            # stored gates are worse on purpose
            self.quality = 20 + 20 * self.work - (recipe.choices["r"].parameters["gates"] == "stored")
            self.columns = {"recipe": self}

        def speedup(self):
            return 1 / self.work

        def mean(self, name):
            return self.quality

    monkeypatch.setattr(timeline, "compare", lambda model, recipe, *_: Measured(recipe))
    said = []
    goals = {"balanced": 2.2, "never": 1e9}
    found = search(Model, [random_trajectory(STEPS)], [], {}, goals, 1.0, said.append, slack=(0.9, 1.0, 1.2))
    recipe, measured = found["balanced"]
    assert measured.speedup() == min(24 / n for n in range(1, 25) if 24 / n >= 2.2)
    assert recipe.choices["r"].parameters["gates"] == "current"
    assert found["never"][1].speedup() == 24 / 2
    assert any("no candidate reached" in line for line in said)


def test_trajectories_are_calibrated_by_real_runs():
    pipe = TINY["wan"].build(complete=True)
    model = loading.Model("tiny", pipe, WAN, {}, True)
    arguments = {"num_inference_steps": 9, "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0}
    job, said = Job("a red ring", 3), []
    (run,) = timeline.trajectories_of(model, [job], arguments, said.append)
    rows = ("C" * 8 + "r", "C" * 8 + "s")
    recipe = timeline.recipe_of((0,) * 8 + (2,), model, 4, "stored", "last")
    with api.accelerated(pipe, recipe):
        frames = generate(model, job.prompt, arguments, job.seed).frames
    moved = float(np.linalg.norm(frames - run.frames))
    assert moved > 0 and run.error(rows) == pytest.approx(moved, rel=1e-6)
    assert len(said) == 1 and "an error grows" in said[0]
