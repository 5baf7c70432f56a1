"""The renderer: one scene, every size."""

from itertools import pairwise

import numpy as np
import pytest

from dit_accel.scenes import Scene, Thing, cover, parse, render
from dit_accel.scenes.render import lay_out

CAPTION = "a red disc moving left and a blue square still on a navy striped background"


def test_a_clip_is_floats_within_one_and_repeats_exactly():
    clip = render(parse(CAPTION), 7, frames=9, height=48, width=64)
    assert clip.shape == (9, 48, 64, 3) and clip.dtype == np.float32
    assert clip.min() >= 0 and clip.max() <= 1
    np.testing.assert_array_equal(clip, render(parse(CAPTION), 7, frames=9, height=48, width=64))


def test_another_seed_is_another_clip():
    first, second = (render(parse(CAPTION), seed, frames=3) for seed in (1, 2))
    assert np.abs(first - second).mean() > 0.02


def test_a_larger_size_shows_the_same_scene():
    small = render(parse(CAPTION), 3, frames=2, height=64, width=64)
    large = render(parse(CAPTION), 3, frames=2, height=128, width=128)
    averaged = large.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    # the edges are a fixed number of pixels wide, so only they differ
    assert np.abs(averaged - small).mean() < 0.01


def test_a_still_clip_stands_still_and_a_moving_one_ends_elsewhere():
    still = render(parse("a red disc still on a navy plain background"), 0, frames=5)
    assert np.array_equal(still[0], still[-1])
    moving = render(parse("a red disc moving up on a navy plain background"), 0, frames=5)
    rows = [np.nonzero(frame[..., 0] > 0.5)[0].mean() for frame in moving]
    assert all(later < earlier for earlier, later in pairwise(rows))


@pytest.mark.parametrize("seed", range(8))
def test_things_stay_in_the_frame(seed):
    scene = parse("a red disc darting right and a white ring moving down on a forest plain background")
    layout = lay_out(scene, seed, (1.0, 1.0))
    ends = layout.start + np.array([[0, 0.42], [0.42, 0]])
    for centres in (layout.start, ends):
        assert (centres - layout.radius[:, None] > 0).all() and (centres + layout.radius[:, None] < 1).all()


def test_cover_is_where_things_are_and_nowhere_else():
    scene = Scene((Thing("red", "ring", "moving left"), Thing("white", "square", "still")), "navy", "plain")
    clip, share = render(scene, 5, 9, 48, 64), cover(scene, 5, 9, 48, 64).max(0)
    ground = clip[0, share[0] == 0][0]
    assert share.shape == (9, 48, 64) and 0.05 < share.mean() < 0.4
    assert (clip[share == 0] == ground).all()
    assert (np.abs(clip[share == 1] - ground).max(axis=-1) > 0.2).all()
