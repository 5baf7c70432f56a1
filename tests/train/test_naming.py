"""What middle tokens are asked to name: the thing they show, of the right scene, and only where told."""

import pytest
import torch

from dit_accel.scenes.caption import parse
from dit_accel.train.toys.attributes import CHOICES, classes_of
from dit_accel.train.toys.denoiser import Stage, Task
from dit_accel.train.toys.latents import Batch
from dit_accel.train.toys.models import build_denoiser
from dit_accel.train.toys.naming import Naming

CAPTIONS = [
    "a red ring moving left and a blue square still on a navy striped background",
    "a white disc darting up on a forest plain background",
]


def things():
    """Of 8 tokens the first scene's things cover two each, one token a little; the second's covers one."""
    share = torch.zeros(2, 2, 1, 2, 4)
    flat = share.flatten(2)
    flat[0, 0, :2], flat[0, 1, 4:6], flat[0, 1, 7] = 1.0, 0.5, 0.1
    flat[1, 0, 3] = 1.0
    return flat.view_as(share)


def taught(naming, denoiser, answers):
    """The loss when the tokens hold `answers` `[B, N, 3]` and the map reads them without fault."""
    logits = [torch.nn.functional.one_hot(answers[..., part], n) for part, n in enumerate(CHOICES)]
    naming.tokens = 50.0 * torch.cat(logits, -1).float()
    denoiser.namer = torch.nn.Identity()
    return naming.loss(denoiser, things(), CAPTIONS)


def right_answers():
    answers = torch.zeros(2, 8, 3, dtype=torch.long)
    first, second = (torch.tensor([classes_of(thing) for thing in parse(c).things]) for c in CAPTIONS)
    answers[0, :2], answers[0, 4:6], answers[1, 3] = first[0], first[1], second[0]
    return answers


def test_each_token_is_asked_for_the_thing_it_shows():
    denoiser = build_denoiser("wan")
    naming = Naming(denoiser)
    assert taught(naming, denoiser, right_answers()) < 1e-6
    wrong = right_answers()
    wrong[0, 4] = wrong[0, 0]
    # three attributes off by 50, on one of five tokens
    assert taught(naming, denoiser, wrong).item() == pytest.approx(30.0, rel=1e-4)
    barely = right_answers()
    barely[0, 7] = torch.tensor([3, 3, 3])
    assert taught(naming, denoiser, barely) < 1e-6


@pytest.mark.parametrize("toy", ["wan", "pixart", "qwen_image"])
def test_naming_reaches_the_first_half_of_the_blocks_and_no_further(toy):
    torch.manual_seed(0)
    denoiser = build_denoiser(toy)
    task = Task(toy, denoiser)
    share = things()
    if toy == "qwen_image":  # two by two latents a token
        share = share.repeat_interleave(2, 3).repeat_interleave(2, 4)
    latents = torch.randn(2, denoiser.transformer.config.out_channels, *share.shape[2:])
    batch = Batch(latents, share, CAPTIONS)
    if toy != "wan":
        batch = Batch(latents[:, :, 0], share[:, :, 0], CAPTIONS)
    task.predict(denoiser, batch.latents, torch.tensor([0.5, 0.9]), CAPTIONS)
    assert task.naming.tokens.shape == (2, 8, 128)  # of the picture, not of the text
    task.naming.loss(denoiser, batch.things, CAPTIONS).backward()
    blocks = getattr(denoiser.transformer, "transformer_blocks", None) or denoiser.transformer.blocks
    reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
    assert reached == [True, True, True, True, False, False]
    assert denoiser.text_encoder.get_input_embeddings().weight.grad.any()


def test_a_caption_that_was_dropped_is_not_asked_about():
    denoiser = build_denoiser("wan")
    task = Task("wan", denoiser)
    batch = Batch(torch.randn(2, 12, 1, 2, 4), things(), CAPTIONS)
    task.naming.tokens = torch.randn(2, 8, 128)
    only_second = task.naming.loss(denoiser, batch.things, ["", CAPTIONS[1]])
    task.naming.tokens = torch.randn(2, 8, 128)
    assert only_second > 0 and task.naming.loss(denoiser, batch.things, ["", ""]) == 0
    loss, numbers = task.loss(denoiser, batch, Stage("video", 2, naming=0.5))
    assert loss.item() == pytest.approx(numbers["weighted"] + 0.5 * numbers["unnamed"], rel=1e-5)
