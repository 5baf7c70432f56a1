"""Reading pixels back: sure on real renders, low on wrong captions, steady under blur and noise."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from dit_accel.scenes import attributes, parse, render, score
from dit_accel.train.toys.data import unseen_pairs

CLIPS = unseen_pairs(12, moving=True, seed=5)
PICTURES = unseen_pairs(25, moving=False, seed=5)


def draw(pair, moving):
    size = 64 if moving else 128
    return render(*pair, frames=17 if moving else 1, height=size, width=size)


@pytest.mark.parametrize(("pairs", "moving"), [(CLIPS, True), (PICTURES, False)])
def test_a_render_shows_all_that_its_caption_says(pairs, moving):
    assert np.mean([score(draw(pair, moving), pair[0]) for pair in pairs]) >= 0.99


@pytest.mark.parametrize(("pairs", "moving"), [(CLIPS, True), (PICTURES, False)])
def test_another_caption_scores_low(pairs, moving):
    scores = [score(draw(pair, moving), other[0]) for pair, other in pairwise(pairs)]
    assert np.mean(scores) < 0.45


def test_blur_and_noise_of_an_autoencoder_change_little():
    noise = np.random.default_rng(0)
    scores = []
    for pair in CLIPS:
        clip = gaussian_filter(draw(pair, True), (0, 0.7, 0.7, 0)) + noise.normal(0, 0.03, (17, 64, 64, 3))
        scores.append(score(clip.clip(0, 1).astype(np.float32), pair[0]))
    assert np.mean(scores) >= 0.95


def test_each_attribute_is_read_on_its_own():
    clip = render(parse("a red ring darting left on a navy checked background"), 4, frames=17)
    seen = attributes(clip)
    assert seen == {
        "background": "navy",
        "texture": "checked",
        "things": {"red": {"shape": "ring", "motion": "darting left"}},
    }
    wrong = {
        "a red ring moving left on a navy checked background": 6 / 7,
        "a red disc darting left on a navy checked background": 6 / 7,
        "a red ring darting left on a forest checked background": 6 / 7,
        # the colour, shape, pace and direction go together with the thing that is not there
        "a blue ring darting left on a navy checked background": 3 / 7,
    }
    for caption, expected in wrong.items():
        assert score(clip, parse(caption)) == pytest.approx(expected), caption


def test_noise_alone_scores_low():
    frames = np.random.default_rng(0).random((9, 64, 64, 3)).astype(np.float32)
    assert np.mean([score(frames, scene) for scene, _ in CLIPS]) < 0.4
