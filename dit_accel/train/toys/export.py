"""Writes a toy as a user gets it: `save_pretrained` in half precision, and `generation.json` beside it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dit_accel.train.toys.models import DEFAULTS, assemble, build_denoiser
from dit_accel.train.toys.untrained import build_cogvideox
from dit_accel.train.toys.vae import build_vae


def build_toy(toy: str, vae: Path | None = None, denoiser: Path | None = None) -> DiffusionPipeline:
    """A toy's pipeline; `vae` is a folder in diffusers format, `denoiser` a run's, None means untrained."""
    if toy == "cogvideox":
        return build_cogvideox()
    torch.manual_seed(0)
    parts = build_denoiser(toy)
    if denoiser is not None:
        parts.load_state_dict(load_file(denoiser / "average.safetensors"), strict=False)
    autoencoder = build_vae(toy)
    return assemble(toy, parts, autoencoder if vae is None else type(autoencoder).from_pretrained(vae))


def export_toy(pipeline: DiffusionPipeline, toy: str, folder: Path) -> None:
    """Saves `pipeline` in fp16 safetensors, so that `from_pretrained(folder)` gives it back in any dtype."""
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    # where the autoencoder was trained is nobody's business
    vae = folder / "vae" / "config.json"
    vae.write_text(re.sub(r'  "_name_or_path": .*\n', "", vae.read_text()))
    # transformers loads in the dtype that config.json names, diffusers in float32: name that one, or a CPU
    # pipeline mixes two
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    (folder / "generation.json").write_text(json.dumps(asdict(DEFAULTS[toy]), indent=2) + "\n")
