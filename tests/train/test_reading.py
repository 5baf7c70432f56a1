"""The text encoder's lessons in reading: the right words, the right answers, and nothing else moves."""

import json
import math

import pytest
import torch

from dit_accel.scenes.caption import MOTIONS, SHAPES, parse
from dit_accel.train.loop import LoopConfig
from dit_accel.train.toys.attributes import COLOUR_NAMES
from dit_accel.train.toys.models import build_denoiser
from dit_accel.train.toys.reading import UNSAID, Reading, train_reading, words_of_things
from dit_accel.train.toys.text import build_tokenizer

CAPTION = "a red ring moving left and a blue square still on a navy striped background"


def test_each_word_of_a_thing_is_asked_about_its_own_thing():
    tokens = build_tokenizer().tokenize(CAPTION)
    asked = {
        tokens[place]: (COLOUR_NAMES[colour], SHAPES[shape], MOTIONS[motion])
        for place, colour, shape, motion in words_of_things(parse(CAPTION))
    }
    left, right = ("red", "ring", "moving left"), ("blue", "square", "still")
    assert asked == dict.fromkeys(("red", "ring", "moving", "left"), left) | dict.fromkeys(
        ("blue", "square", "still"), right
    )


def test_a_causal_encoder_is_asked_only_for_what_has_been_said():
    rows = words_of_things(parse(CAPTION), causal=True)
    said = {place: [each != UNSAID for each in classes] for place, *classes in rows}
    once, twice, all_three = [True, False, False], [True, True, False], [True, True, True]
    assert said == {1: once, 2: twice, 3: twice, 4: all_three, 7: once, 8: twice, 9: all_three}
    known = {place: classes for place, *classes in words_of_things(parse(CAPTION))}
    for place, *classes in rows:
        assert all(each in (UNSAID, right) for each, right in zip(classes, known[place], strict=True))


def test_what_is_not_said_yet_does_not_make_the_loss_smaller():
    denoiser = build_denoiser("qwen_image")
    reading = Reading("qwen_image", denoiser, keep=0.0)
    denoiser.reader = torch.nn.Linear(64, 19)
    for weight in denoiser.reader.parameters():
        torch.nn.init.zeros_(weight)
    _, numbers = reading.loss(denoiser, [parse("a red ring and a blue square on a navy plain background")])
    guessed = {"colour": math.log(6), "shape": math.log(4), "motion": math.log(9)}
    assert {name: numbers[name] for name in guessed} == pytest.approx(guessed, rel=1e-5)


@pytest.mark.parametrize("toy", ["pixart", "qwen_image"])
def test_reading_gets_better_and_leaves_the_transformer_alone(toy, tmp_path):
    config = LoopConfig(tmp_path, steps=40, lr=2e-3, warmup=5, cooldown=5, save_every=40)
    torch.manual_seed(config.seed)
    before = build_denoiser(toy).state_dict()
    after = train_reading(toy, config).state_dict()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["colour"] < 0.8 * lines[0]["colour"]
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved
    assert all(name.startswith("text_encoder.") for name in moved)


def test_what_the_transformer_knows_of_the_words_is_kept(tmp_path):
    denoiser = build_denoiser("wan")
    free, kept = (Reading("wan", denoiser, keep=keep) for keep in (0.0, 1.0))
    denoiser.reader = torch.nn.Linear(64, 19)
    with torch.no_grad():
        denoiser.text_encoder.shared.weight += 0.5
    assert kept.loss(denoiser, [parse(CAPTION)])[0] > free.loss(denoiser, [parse(CAPTION)])[0] + 0.01
