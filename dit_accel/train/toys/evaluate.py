"""What a toy is worth: reconstruction, faithfulness, half the steps, attention's share of the time."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from torch import nn

from dit_accel.metrics import faithfulness, psnr
from dit_accel.scenes import render
from dit_accel.train.toys.data import unseen_pairs
from dit_accel.train.toys.vae import takes_frames


def load_toy(folder: Path) -> tuple[DiffusionPipeline, dict]:
    """The pipeline in `folder`, quiet, and its `generation.json`."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, json.loads((folder / "generation.json").read_text())


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline, defaults: dict, caption: str, seed: int, steps: int | None = None
) -> np.ndarray:
    """One result `[F, H, W, 3]` of a trained toy at its default call."""
    scale = defaults["guidance_scale"]
    # without a negative prompt Qwen-Image leaves guidance out
    guidance = {"guidance_scale": scale}
    if isinstance(pipeline, QwenImagePipeline):
        guidance = {"true_cfg_scale": scale, "negative_prompt": " "}
    arguments = {
        "prompt": caption,
        "height": defaults["height"],
        "width": defaults["width"],
        "num_inference_steps": steps or defaults["num_inference_steps"],
        **guidance,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if defaults["num_frames"] > 1:
        return pipeline(num_frames=defaults["num_frames"], **arguments).frames[0]
    return pipeline(**arguments).images[:1]


def measure_faithfulness(
    folder: Path, count: int, part: int = 0, parts: int = 1, steps: int | None = None
) -> list[float]:
    """Faithfulness of each of `count` unseen pairs (or of every `parts`-th of them, to share the work)."""
    pipeline, defaults = load_toy(folder)
    pairs = unseen_pairs(count, moving=defaults["num_frames"] > 1)[part::parts]
    return [faithfulness(generate(pipeline, defaults, str(s), seed, steps), str(s)) for s, seed in pairs]


def measure_half_steps(folder: Path, count: int) -> list[float]:
    """PSNR in dB of the same pairs with half of the default steps, against the default."""
    pipeline, defaults = load_toy(folder)
    steps = defaults["num_inference_steps"]
    pairs = unseen_pairs(count, moving=defaults["num_frames"] > 1, seed=1)
    return [
        psnr(*(generate(pipeline, defaults, str(s), seed, steps // part) for part in (2, 1)))
        for s, seed in pairs
    ]


@torch.no_grad()
def measure_reconstruction(folder: Path, count: int) -> list[float]:
    """PSNR in dB of unseen clips or pictures through the autoencoder."""
    pipeline, defaults = load_toy(folder)
    frames, size = defaults["num_frames"], defaults["height"]
    values = []
    for scene, seed in unseen_pairs(count, moving=frames > 1, seed=2):
        clip = render(scene, seed, frames, size, size)
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].mul(2).sub(1)  # [1, 3, F, H, W]
        pixels = pixels if takes_frames(pipeline.vae) else pixels[:, :, 0]
        output = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
        output = (output if output.ndim == 5 else output[:, :, None])[0].permute(1, 2, 3, 0)
        values.append(psnr(output.add(1).div(2).clamp(0, 1), clip))
    return values


def measure_attention_share(folder: Path, repeats: int = 3) -> float:
    """Self-attention or joint attention modules' share of the transformer's seconds at the default size."""
    pipeline, defaults = load_toy(folder)
    spent = {"attention": 0.0, "all": 0.0}
    transformer = pipeline.transformer
    for block in getattr(transformer, "transformer_blocks", None) or transformer.blocks:
        _time(block.attn if hasattr(block, "attn") else block.attn1, spent, "attention")
    _time(transformer, spent, "all")
    for _ in range(repeats):
        generate(pipeline, defaults, "a red disc on a navy plain background", 0, steps=2)
    return spent["attention"] / spent["all"]


def measure_rest(folder: Path, count: int = 8) -> dict[str, float]:
    """All but faithfulness: reconstruction and half the steps in dB, attention share, bytes of weights."""
    return {
        "reconstruction_psnr": float(np.mean(measure_reconstruction(folder, count))),
        "half_steps_psnr": float(np.mean(measure_half_steps(folder, count // 2))),
        "attention_share": measure_attention_share(folder),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _time(module: nn.Module, spent: dict[str, float], key: str) -> None:
    forward = module.forward

    def timed(*args, **kwargs):
        began = time.perf_counter()
        output = forward(*args, **kwargs)
        spent[key] += time.perf_counter() - began
        return output

    module.forward = timed
