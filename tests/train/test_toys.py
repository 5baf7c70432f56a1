"""The toys' training: exact shortcuts, resumable, and pipelines that load."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    DiffusionPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    WanPipeline,
)
from torch import nn

from dit_accel.compat import decode_unclamped
from dit_accel.scenes import cover
from dit_accel.train.loop import LoopConfig
from dit_accel.train.toys.data import training_scene
from dit_accel.train.toys.denoiser import (
    Stage,
    Task,
    sample_sigma,
    train_denoiser,
)
from dit_accel.train.toys.export import build_toy, export_toy
from dit_accel.train.toys.latents import Batch, Pool, encode_pool
from dit_accel.train.toys.models import build_denoiser
from dit_accel.train.toys.shortcuts import WAN_TEXT_LENGTH, FrameWindow
from dit_accel.train.toys.text import build_tokenizer
from dit_accel.train.toys.vae import build_vae, video_batch

CAPTIONS = ["a red ring moving left on a navy plain background", ""]


def small_latents(frames=3):
    return torch.randn(2, 12, frames, 4, 4, generator=torch.Generator().manual_seed(0))


def awake(denoiser):
    # the last layer begins at zero, and zero equals zero whatever came before
    nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.1)
    return denoiser.eval()


@torch.no_grad()
def test_one_zero_key_counts_as_all_the_padding_of_the_pipeline():
    torch.manual_seed(0)
    denoiser = awake(build_denoiser("wan"))
    latents, sigma = small_latents(), torch.tensor([0.4, 0.9])
    short = Task("wan", denoiser).predict(denoiser, latents, sigma, CAPTIONS)
    words = build_tokenizer()(CAPTIONS, padding="max_length", max_length=WAN_TEXT_LENGTH, return_tensors="pt")
    text = denoiser.text_encoder(words.input_ids, words.attention_mask).last_hidden_state
    text = text * words.attention_mask[..., None]
    padded = denoiser.transformer(latents, sigma * 1000, text, return_dict=False)[0]
    scale = padded.abs().max()
    assert scale > 0.01
    # two orders of summation of 512 keys in float32
    assert (short - padded).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("toy", ["wan", "pixart"])
def test_training_runs_where_the_weights_are(toy):
    """On the meta device, which refuses to meet a tensor of the CPU: the values do not matter here."""

    class Encoder(nn.Embedding):  # T5 asks for the values of its mask
        def forward(self, words, mask):
            return SimpleNamespace(last_hidden_state=super().forward(words) * mask[..., None])

    denoiser = build_denoiser(toy)
    denoiser.text_encoder = Encoder(64, 64)
    task = Task(toy, denoiser)
    task.naming.loss = lambda module, things, captions: things.mean()
    latents = small_latents() if toy == "wan" else torch.randn(2, 16, 8, 8)
    things = torch.zeros(2, 2, *latents.shape[2:])
    loss, _ = measured(
        task.loss, denoiser.to("meta"), Batch(latents, things, CAPTIONS), Stage("pool", 2, naming=1.0)
    )
    assert loss.device.type == "meta"


def measured(loss, *arguments):
    """A loss on the meta device has no number to tell: every number is 0 there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: 0.0)
        return loss(*arguments)


@torch.no_grad()
def test_a_window_of_frames_keeps_their_places_in_time():
    transformer = build_denoiser("wan").transformer
    window = FrameWindow(transformer)
    whole = transformer.rope(small_latents(9))
    window.frames = [0, 4, 8]
    chosen = transformer.rope(small_latents(3))
    for table, part in zip(whole, chosen, strict=True):
        assert torch.equal(table.unflatten(1, (9, 16))[:, [0, 4, 8]].flatten(1, 2), part)


def test_a_stage_draws_frames_in_order_and_sometimes_both_ends():
    drawn = [Stage("video", 1, 3).frames(number, 9) for number in range(100)]
    assert all(frames == sorted(set(frames)) and len(frames) == 3 for frames in drawn)
    assert 10 < sum(frames[0] == 0 and frames[-1] == 8 for frames in drawn) < 60
    assert Stage("video", 1).frames(0, 9) is None


def test_a_pools_things_lie_on_the_latents_that_show_them(tmp_path):
    vae = build_vae("wan").eval()
    encode_pool(vae, tmp_path / "a.safetensors", count=3, seed=0, size=32, frames=9)
    batch = Pool([tmp_path / "a.safetensors"], seed=0).batch(0, 3)
    assert batch.things.shape == (3, 2, 3, 8, 8) and len(batch.captions) == 3
    order = np.random.default_rng([0, 0]).permutation(3)
    drawn = np.random.default_rng([0, 32, 9])
    scenes = [training_scene(drawn, moving=True) for _ in range(3)]
    for place, (number, things) in enumerate(zip(order, batch.things, strict=True)):
        scene, seed = scenes[number]
        share = torch.from_numpy(cover(scene, seed, 9, 32, 32)).unflatten(2, (8, 4)).unflatten(4, (8, 4))
        share = share.mean((3, 5))  # [K, 9, 8, 8]
        assert batch.captions[place] == str(scene)
        assert torch.allclose(things[: len(share), 0], share[:, 0], atol=1e-3)
        assert torch.allclose(things[: len(share), 2], share[:, 5:].mean(1), atol=1e-3)
        assert not things[len(share) :].any()
    kept = batch.keep([0, 2])
    assert torch.equal(kept.things[:, :, 1], batch.things[:, :, 2]) and kept.latents.shape[2] == 2


def test_what_things_cover_weighs_more_the_less_noise_there_is():
    def weighted(things):
        covered = torch.zeros(2, 2, 3, 4, 4)
        covered[:, 1, ..., :2] = 1.0
        batch = Batch(small_latents(), covered, CAPTIONS)
        task = Task("wan", denoiser)
        task.predict = lambda *_: torch.zeros(())
        torch.manual_seed(1)
        return task.loss(denoiser, batch, Stage("video", 2, things=things))

    denoiser = build_denoiser("wan")
    (plain, numbers), (heavy, same) = weighted(0.0), weighted(6.0)
    assert plain.item() == pytest.approx(numbers["loss"]) and numbers["loss"] == same["loss"]
    torch.manual_seed(1)
    torch.rand(()), torch.rand(())
    sigma = sample_sigma(2, 3.0).view(-1, 1, 1, 1, 1)
    latents = small_latents()
    error = (torch.randn_like(latents) - latents).square()
    weight = torch.ones_like(error)
    weight[..., :2] += (6 * (1 - sigma)).expand_as(weight[..., :2])
    assert heavy.item() == pytest.approx(((weight * error).sum() / weight.sum()).item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("toy", ["wan", "qwen_image"])
def test_the_unclamped_decoder_is_the_autoencoders_own(toy):
    torch.manual_seed(0)
    vae = build_vae(toy).eval()
    latents = torch.randn(1, vae.config.z_dim, 3, 4, 4)
    assert torch.equal(decode_unclamped(vae, latents).clamp(-1, 1), vae.decode(latents).sample)


def test_a_training_clip_batch_is_pixels_within_one():
    pixels = video_batch(0, 3, batch=1, frames=5, size=32)
    assert pixels.shape == (1, 3, 5, 32, 32) and pixels.abs().max() <= 1


CLASSES = {
    "wan": WanPipeline,
    "pixart": PixArtSigmaPipeline,
    "cogvideox": CogVideoXPipeline,
    "qwen_image": QwenImagePipeline,
}


@pytest.mark.parametrize("toy", CLASSES)
def test_an_exported_toy_loads_by_its_folder_and_runs(toy, tmp_path):
    export_toy(build_toy(toy), toy, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is CLASSES[toy]
    assert {part.dtype for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae)} == {
        torch.float32
    }
    assert json.loads((tmp_path / "generation.json").read_text())["num_inference_steps"] > 1
    arguments = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    arguments |= {"num_frames": 5} if toy in ("wan", "cogvideox") else {}
    arguments |= {"use_resolution_binning": False} if toy == "pixart" else {}
    first, second = (pipeline(CAPTIONS[0], generator=torch.manual_seed(0), **arguments)[0] for _ in range(2))
    assert first.isfinite().all() and torch.equal(first, second)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert size < 12_000_000


def test_qwens_chat_template_has_the_head_that_the_pipeline_cuts_off():
    pipeline = build_toy("qwen_image")
    head = pipeline.prompt_template_encode.split("{}")[0]
    assert len(pipeline.tokenizer(head).input_ids) == pipeline.prompt_template_encode_start_idx


def test_training_can_start_from_an_exported_pipeline():
    from dit_accel.recipe import resolve_model
    from dit_accel.train.toys.denoiser import load_start

    folder = Path(resolve_model("toys/wan"))
    denoiser = build_denoiser("wan")
    load_start(denoiser, folder)
    shipped = DiffusionPipeline.from_pretrained(folder).transformer.state_dict()
    loaded = denoiser.transformer.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in shipped.items())


def test_the_text_encoder_keeps_what_it_has_read(tmp_path):
    encode_pool(build_vae("pixart").eval(), tmp_path / "image128-0.safetensors", count=32, seed=0, size=128)
    torch.manual_seed(0)
    before = build_denoiser("pixart").state_dict()
    config = LoopConfig(tmp_path / "run", steps=2, lr=1e-3, warmup=1, cooldown=1)
    after = train_denoiser("pixart", "small", tmp_path, config).state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert any(name.startswith("transformer.") for name in changed)
    assert not any(name.startswith("text_encoder.") for name in changed)
