"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Option("--model", "-m", help="A toy (toys/wan), a diffusers pipeline folder, or a Hub id.")
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option("--height", min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", min=1, help="Pixels.")]
NumFrames = Annotated[int | None, typer.Option("--num-frames", min=1, help="Frames of a video.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Strength of classifier-free guidance.")]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="What should not appear.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Start noise: the same on every device.")
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: the model's own, else by device.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1...")]
Offload = Annotated[bool, typer.Option("--offload", help="Keep modules in host memory until they run.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit with 1 if the recipe did nothing or fell back anywhere.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Write the comparison as one self-contained file.")]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A name (dit-accel recipes list), a .toml file, a Hub id, or none. "
        "[default: the model's own balanced or safe one, if shipped]",
    ),
]
Results = Annotated[Path | None, typer.Option("--results", help="Folder of result lines to append to.")]
ResultsName = Annotated[str, typer.Option("--results-name", help="Name of the file in that folder.")]
