"""Trains the toy pipelines: first `vae`, `encode`, `read`, the stages of `denoiser`, `export`, `evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

app = typer.Typer(help=__doc__, no_args_is_help=True)
Folder = Annotated[Path, typer.Option(help="Where checkpoints and the log go; an existing run is resumed.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")]


@app.command()
def vae(
    toy: str,
    folder: Folder,
    steps: int = 1000,
    lr: float = 4e-3,
    cooldown: int = 300,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Trains the autoencoder of TOY (wan, pixart or qwen_image)."""
    from dit_accel.train.loop import LoopConfig
    from dit_accel.train.toys.vae import train_vae

    _threads(threads)
    train_vae(toy, LoopConfig(folder, steps, lr, cooldown=cooldown, seed=seed, save_every=100))


@app.command()
def encode(
    toy: str,
    vae_folder: Path,
    pools: Path,
    count: int = 1024,
    size: int = 64,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Encodes COUNT training scenes of TOY at SIZE pixels into one pool file."""
    from dit_accel.train.toys.latents import POOLS, encode_pool
    from dit_accel.train.toys.models import DEFAULTS
    from dit_accel.train.toys.vae import build_vae

    _threads(threads)
    vae = type(build_vae(toy)).from_pretrained(vae_folder)
    file = pools / f"{POOLS[toy]}{size}-{seed:04d}.safetensors"
    encode_pool(vae, file, count, seed, size, DEFAULTS[toy].num_frames)


@app.command()
def read(
    toy: str,
    folder: Folder,
    start: Path | None = None,
    steps: int = 2500,
    lr: float = 1.5e-3,
    cooldown: int = 700,
    seed: int = 0,
    threads: Threads = 0,
) -> None:
    """Teaches TOY's text encoder which words belong together; the transformer of START stays as it is."""
    from dit_accel.train.loop import LoopConfig
    from dit_accel.train.toys.reading import train_reading

    _threads(threads)
    train_reading(toy, LoopConfig(folder, steps, lr, cooldown=cooldown, seed=seed, save_every=100), start)


@app.command()
def denoiser(
    toy: str,
    stage: str,
    pools: Path,
    folder: Folder,
    start: Path | None = None,
    steps: int = 1000,
    lr: float = 1e-3,
    cooldown: int = 200,
    seed: int = 0,
    save_every: int = 100,
    threads: Threads = 0,
) -> None:
    """Trains one STAGE of TOY's transformer and text encoder on the latents in POOLS."""
    from dit_accel.train.loop import LoopConfig
    from dit_accel.train.toys.denoiser import train_denoiser

    _threads(threads)
    config = LoopConfig(folder, steps, lr, cooldown=cooldown, seed=seed, save_every=save_every)
    train_denoiser(toy, stage, pools, config, start)


@app.command()
def export(toy: str, folder: Path, vae: Path | None = None, denoiser: Path | None = None) -> None:
    """Writes TOY to FOLDER; VAE is a run's `vae` folder, DENOISER a run's folder (absent: untrained)."""
    from dit_accel.train.toys.export import build_toy, export_toy

    export_toy(build_toy(toy, vae, denoiser), toy, folder)


@app.command()
def evaluate(
    folder: Path,
    count: Annotated[
        int, typer.Option(help="Unseen pairs for faithfulness; the other measures take a few.")
    ] = 50,
    part: Annotated[
        int, typer.Option(help="Of PARTS processes that share the pairs, this one's number.")
    ] = 0,
    parts: int = 1,
    faithfulness_only: bool = False,
    threads: Threads = 0,
) -> None:
    """Measures the toy in FOLDER and prints one JSON object."""
    from dit_accel.train.toys import evaluate as measure

    _threads(threads)
    values = measure.measure_faithfulness(folder, count, part, parts)
    result: dict = {"faithfulness": sum(values) / len(values), "pairs": len(values), "each": values}
    if not faithfulness_only:
        result |= measure.measure_rest(folder)
    typer.echo(json.dumps(result))


@app.callback()
def _program() -> None:
    """Keeps the subcommands named even while there is one."""


def _threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)


if __name__ == "__main__":
    app()
