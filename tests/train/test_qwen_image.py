"""`toys/qwen_image` in training: prompts, packed latents, noise levels and places are the pipeline's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dit_accel.train.toys.denoiser import Task
from dit_accel.train.toys.evaluate import generate
from dit_accel.train.toys.latents import Pool, encode_pool, normalise
from dit_accel.train.toys.models import SHIFT, assemble, build_denoiser
from dit_accel.train.toys.shortcuts import SpreadPlaces
from dit_accel.train.toys.vae import QWEN_CHANNELS, build_vae, measure_statistics, training_batch

SHORT = "a red ring on a navy plain background"
LONG = "a white disc and a blue square on a forest striped background"


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    denoiser = build_denoiser("qwen_image").eval()
    # the last layer begins at zero, and zero equals zero whatever came before
    nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.1)
    return denoiser


@pytest.fixture
def pipeline(denoiser):
    pipeline = assemble("qwen_image", denoiser, build_vae("qwen_image"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def forwards(pipeline, prompts, **arguments):
    """Arguments and output of each forward of the transformer in a call of the pipeline."""
    seen = []
    handle = pipeline.transformer.register_forward_hook(
        lambda _, __, kwargs, output: seen.append((kwargs, output[0])), with_kwargs=True
    )
    negative = [" "] * len(prompts)
    generator = torch.Generator().manual_seed(0)
    pipeline(prompts, negative, 4.0, generator=generator, output_type="latent", **arguments)
    handle.remove()
    return seen


@torch.no_grad()
def test_training_calls_the_transformer_as_the_pipeline_does(denoiser, pipeline):
    size = {"height": 32, "width": 24}
    (given, cond), (_, uncond), *_ = forwards(pipeline, [SHORT, LONG], num_inference_steps=2, **size)
    latents = pipeline._unpack_latents(given["hidden_states"], 32, 24, pipeline.vae_scale_factor)[:, :, 0]
    task = Task("qwen_image", denoiser)
    for captions, output in (([SHORT, LONG], cond), (["", ""], uncond)):
        predicted = task.predict(denoiser, latents, given["timestep"], captions)
        assert predicted.shape == latents.shape
        packed = functional.pixel_unshuffle(predicted, 2).flatten(2).transpose(1, 2)
        assert (packed - output).abs().max() < 1e-5 * output.abs().max()
    # two lengths in a batch: the shorter one's padding is not attended to
    mixed = task.predict(denoiser, latents, given["timestep"], [LONG, ""])
    alone = task.predict(denoiser, latents[1:], given["timestep"][1:], [""])
    assert (mixed[1:] - alone).abs().max() < 1e-5 * alone.abs().max()


@torch.no_grad()
def test_prompts_differ_for_the_transformer(denoiser):
    latents, sigma = torch.randn(1, QWEN_CHANNELS, 8, 8), torch.tensor([0.5])
    task = Task("qwen_image", denoiser)
    captions = (SHORT, SHORT.replace("red", "blue"))  # of one length
    first, second = (task.predict(denoiser, latents, sigma, [caption]) for caption in captions)
    assert (first - second).abs().max() > 1e-4


def test_the_samplers_levels_have_the_shift_of_training(pipeline):
    seen = forwards(pipeline, [SHORT], num_inference_steps=4, height=128, width=128)
    even, shift = np.linspace(1, 0.25, 4), SHIFT["qwen_image"]
    levels = shift * even / (1 + (shift - 1) * even)
    # the last level before 0 is drawn to `shift_terminal`, the first one stays
    terminal = pipeline.scheduler.config.shift_terminal
    stretched = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    assert [given["timestep"].item() for given, _ in seen[::2]] == pytest.approx(stretched.tolist(), rel=1e-4)


def test_half_a_picture_has_every_other_place_of_the_whole():
    transformer = build_denoiser("qwen_image").transformer
    shapes, device = [[(1, 8, 12)]], torch.device("cpu")
    whole, words = transformer.pos_embed(shapes, max_txt_seq_len=5, device=device)
    places = SpreadPlaces(transformer)
    places.stride = 2
    half, same = transformer.pos_embed([[(1, 4, 6)]], max_txt_seq_len=5, device=device)
    assert torch.equal(half, whole.unflatten(0, (8, 12))[::2, ::2].flatten(0, 1))
    assert torch.equal(same, words)
    places.stride = 1
    assert torch.equal(transformer.pos_embed(shapes, max_txt_seq_len=5, device=device)[0], whole)


def test_a_pool_holds_pictures_normalised_by_channel(tmp_path):
    vae = build_vae("qwen_image").eval()
    vae.register_to_config(latents_mean=[0.5] * 4, latents_std=[1.0] * 3 + [2.0])
    encode_pool(vae, tmp_path / "qwen32-0.safetensors", count=3, seed=0, size=32)
    batch = Pool([tmp_path / "qwen32-0.safetensors"], seed=0).batch(0, 3)
    assert batch.latents.shape == (3, 4, 16, 16) and batch.things.shape == (3, 2, 16, 16)
    raw = torch.zeros(1, 4, 1, 2, 2)
    assert normalise(vae, raw)[0, :, 0, 0, 0].tolist() == [-0.5] * 3 + [-0.25]


def test_the_autoencoder_sees_whole_pictures_of_both_sizes():
    shapes = [training_batch("qwen_image", 0, number).shape for number in range(2)]
    assert shapes == [(6, 3, 1, 64, 64), (2, 3, 1, 128, 128)]


def test_a_toy_is_judged_with_guidance(pipeline):
    defaults = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0, "num_frames": 1}
    counted = []
    pipeline.transformer.register_forward_hook(lambda *_: counted.append(1))
    assert generate(pipeline, defaults, SHORT, 0).shape == (1, 32, 32, 3)
    assert len(counted) == 4


def test_a_channel_that_says_nothing_is_not_blown_up():
    vae = build_vae("qwen_image").eval()
    nn.init.zeros_(vae.quant_conv.weight)
    nn.init.zeros_(vae.quant_conv.bias)  # means 0, log variances 0
    mean, std = measure_statistics(vae, [training_batch("qwen_image", 0, 0)])
    assert mean.abs().max() < 0.1 and (std - 1).abs().max() < 0.1
