"""The tiny pipelines: repeatable, alike at every batch size, and complete ones save, load and take words."""

import pytest
import torch
from diffusers import DiffusionPipeline

from dit_accel.testing import TINY
from dit_accel.testing.pipelines import COMPLETE, gradient_image


@pytest.fixture(params=TINY)
def case(request):
    """Every tiny pipeline in turn."""
    return TINY[request.param]


def test_the_same_seed_twice_is_equal_and_another_seed_or_prompt_is_not(case):
    pipe = case.build()
    first = case.call(pipe)

    assert first.isfinite().all()
    assert torch.equal(first, case.call(pipe))
    assert not torch.equal(first, case.call(pipe, seed=1))
    assert not torch.equal(first, case.call(pipe, prompt_seed=1))
    assert not torch.equal(first, case.call(case.build(seed=1)))


def test_the_first_sample_of_a_batch_is_the_single_sample(case):
    pipe = case.build()
    one, three = case.call(pipe, steps=2), case.call(pipe, steps=2, batch=3)

    assert three.shape[0] == 3
    # other batch sizes may pick other CPU kernels: equal up to float32 rounding through 2 x 4 blocks
    assert (one - three[:1]).abs().max() <= 1e-5 * one.abs().max()


def test_images_per_prompt_multiply_the_batch_where_the_pipeline_can(case):
    assert len(case.call(case.build(), steps=2, images_per_prompt=2)) == (2 if case.count_argument else 1)


def test_building_leaves_the_random_state_alone(case):
    before = torch.get_rng_state()
    case.build()
    assert torch.equal(torch.get_rng_state(), before)


def test_no_bias_is_zero_and_no_norm_is_one(case):
    for name, parameter in case.build().transformer.named_parameters():
        assert parameter.ndim != 1 or parameter.std() > 0.05, name


def test_layers_are_counted(case):
    transformer = case.build(layers=5).transformer
    assert len(getattr(transformer, "blocks", None) or transformer.transformer_blocks) == 5


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_pipelines_save_load_and_take_words(name, tmp_path):
    case = TINY[name]
    case.build(complete=True).save_pretrained(tmp_path)
    frames = []
    for pipe in (case.build(complete=True), DiffusionPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        arguments = {"height": 64, "width": 80, "num_inference_steps": 2, "output_type": "np"}
        arguments |= {"num_frames": 9} if case.size[2] > 1 else {}
        arguments |= {"image": gradient_image(case.size)} if case.needs_image else {}
        arguments |= {"use_resolution_binning": False} if case.family == "pixart" else {}
        # the sin-cos table of CogVideoX 2b is made for one text length
        arguments |= {"max_sequence_length": 7} if name == "cogvideox_2b" else {}
        generator = torch.Generator().manual_seed(0)
        frames.append(pipe(prompt="a ring", negative_prompt="blur", generator=generator, **arguments)[0])

    assert frames[0].shape == ((1, 9, 64, 80, 3) if case.size[2] > 1 else (1, 64, 80, 3))
    # weights mapped from a file are aligned differently, so CPU kernels sum in another order: rounding,
    # grown through 2 steps, 4 blocks and a decoder
    assert abs(frames[0] - frames[1]).max() < 1e-3


def test_a_case_of_embeddings_only_says_which_are_complete():
    with pytest.raises(
        ValueError, match=r"qwen_image_edit is built from embeddings only; complete cases: wan,"
    ):
        TINY["qwen_image_edit"].build(complete=True)
