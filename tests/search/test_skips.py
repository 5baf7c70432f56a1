"""Predicted errors against a sampler written out, and the choice of rows against all rows there are."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch

from dit_accel.errors import BadUsage
from dit_accel.families.pixart import PIXART
from dit_accel.families.wan import WAN
from dit_accel.loading import Model
from dit_accel.search.timelines.skips import choose, letters, predicted_error, work
from dit_accel.search.trajectory import Trajectory, calibrate, record, sketch
from dit_accel.testing import TINY


def random_trajectory(steps, seed=0):
    rng = np.random.default_rng(seed)
    cond, uncond = rng.standard_normal((2, steps, 16)).cumsum(1)
    return Trajectory(cond, uncond, -rng.random(steps), guidance=4.0)


def test_the_error_is_how_far_a_sampler_on_the_dense_trajectory_moves_away():
    run = random_trajectory(6)
    cond, uncond = "CCrCCr", "CsssCs"
    moved = np.zeros(16)
    for step in range(6):
        c = run.cond[[0, 1, 1, 3, 4, 4][step]]
        # the last step at which both computed: 0 until step 4 comes
        both = 0 if step < 4 else 4
        u = run.uncond[step] if uncond[step] == "C" else c + run.uncond[both] - run.cond[both]
        exact = run.uncond[step] + 4 * (run.cond[step] - run.uncond[step])
        moved += run.weight[step] * (u + 4 * (c - u) - exact)
    assert run.error((cond, uncond)) == pytest.approx(np.linalg.norm(moved))
    assert run.error(("CCCCCC", "CCCCCC")) == 0


@pytest.mark.parametrize("skips", [0, 1, 3, 4, 7, 8])
def test_the_chosen_rows_are_near_the_best_of_all(skips):
    runs = [random_trajectory(5, seed) for seed in range(3)]
    every = [(0, *rest) for rest in product(range(3), repeat=4) if sum(rest) == skips]
    chosen = choose(runs, skips)
    errors = sorted(predicted_error(runs, actions) for actions in every)
    assert chosen in every and work(chosen) == 1 - skips / 10
    # a descent may end in a local minimum: among the best fifth, and never far away
    assert predicted_error(runs, chosen) <= errors[len(errors) // 5] * (1 + 1e-9)


def test_letters_name_both_branches():
    assert letters((0, 1, 2, 0)) == ("CCrC", "CssC")


def test_calibrated_weights_predict_what_single_skips_did():
    run = dataclasses.replace(random_trajectory(8), frames=np.zeros((1, 2, 2, 3)))
    growth = np.exp(np.linspace(3, -2, 8))

    def skipped(step):
        rows = tuple("C" * step + letter + "C" * (7 - step) for letter in "rs")
        frames = np.zeros((1, 2, 2, 3))
        frames.flat[0] = run.error(rows) * growth[step]
        return frames

    calibrated = calibrate(run, skipped, every=3)
    # steps 1, 4 and 7 were run, those between are interpolated; step 0 is never skipped
    assert np.allclose(calibrated.weight[1:], (run.weight * growth)[1:])
    rows = ("CCCrCCCC", "CCCsCCCC")
    assert calibrated.error(rows) == pytest.approx(run.error(rows) * growth[3])


def test_a_sketch_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 16, 16, generator=generator) + 5
    assert np.linalg.norm(sketch(a) - sketch(b)) == pytest.approx((a - b).norm().item(), rel=0.1)


@pytest.mark.parametrize(("case", "family"), [("wan", WAN), ("pixart_sigma", PIXART)])
def test_a_dense_run_is_recorded_by_branch(case, family):
    tiny = TINY[case]
    pipe = tiny.build(complete=True)
    model = Model("tiny", pipe, family, {}, True)
    seen = []
    pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].double()))
    arguments = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 3.0}
    run = record(model, "a red ring", 0, arguments)
    if family is PIXART:
        uncond, cond = seen[-1].chunk(2)
    else:
        cond, uncond = seen[-2:]
    assert np.allclose(run.cond[-1], sketch(cond)) and np.allclose(run.uncond[-1], sketch(uncond))
    assert run.cond.shape == run.uncond.shape == (3, 1024) and run.guidance == 3.0
    assert run.weight.shape == (3,) and (run.weight < 0).all()
    assert run.frames.ndim == 4


def test_a_search_without_guidance_is_refused():
    pipe = TINY["wan"].build(complete=True)
    model = Model("tiny", pipe, WAN, {}, True)
    with pytest.raises(BadUsage, match="without guidance there is one branch"):
        record(model, "a red ring", 0, {"guidance_scale": 1.0})
