"""Captions: the toys' language, both ways."""

import numpy as np
import pytest

from dit_accel.errors import ToyError
from dit_accel.scenes import Scene, Thing, is_held_out, parse, sample_scene
from dit_accel.train.toys.data import FIRST_UNSEEN_SEED, training_scene, unseen_pairs


@pytest.mark.parametrize("moving", [True, False])
def test_a_caption_parses_back_into_its_scene(moving):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng, moving)
        assert parse(str(scene)) == scene


def test_a_caption_reads_like_english():
    scene = Scene((Thing("red", "ring", "moving left"), Thing("blue", "square", "still")), "navy", "striped")
    assert str(scene) == "a red ring moving left and a blue square still on a navy striped background"


def test_an_unknown_word_is_named_with_its_nearest():
    with pytest.raises(ToyError, match=r"'rong' is not in the toys' vocabulary; nearest: ring"):
        parse("a red rong on a navy plain background")


@pytest.mark.parametrize(
    "caption", ["a red ring", "red on a navy plain background", "a ring red on a navy plain background", ""]
)
def test_known_words_in_a_wrong_order_are_no_sentence(caption):
    with pytest.raises(ToyError, match="is not of the form"):
        parse(caption)


def test_training_and_evaluation_share_no_caption_and_no_seed():
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene, seed = training_scene(rng, moving=True)
        assert not is_held_out(str(scene)) and seed < FIRST_UNSEEN_SEED
    for scene, seed in unseen_pairs(50, moving=True):
        assert is_held_out(str(scene)) and seed >= FIRST_UNSEEN_SEED


def test_unseen_pairs_are_the_same_each_time():
    assert unseen_pairs(5, moving=False) == unseen_pairs(9, moving=False)[:5]
