"""`dit-accel generate`: one video or image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import asked
from dit_accel.cli import options as option
from dit_accel.cli.screen import Bars, Debug, say

if TYPE_CHECKING:
    from dit_accel.generate import Sample
    from dit_accel.loading import Model
    from dit_accel.recipe import Recipe
    from dit_accel.run_report import Report

EXAMPLES = """
**Examples**

- A toy, in seconds: `dit-accel generate -m toys/wan -o ring.mp4
  -p "a red ring moving left on a navy striped background"`
- A real model: `dit-accel generate -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers -r wan2.1-t2v-1.3b/safe
  -p "a cat on a skateboard" --height 480 --width 832 --num-frames 81 --compile -o cat.mp4 --report cat.html`
- Dense, from a folder: `dit-accel generate -m ./my-pipeline -r none -p "a glass of juice" -o juice.png`
"""


def generate(
    model: option.ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to generate.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="FILE.mp4, .gif or .png (a video becomes a strip of frames).")
    ],
    negative_prompt: option.NegativePrompt = None,
    steps: option.Steps = None,
    height: option.Height = None,
    width: option.Width = None,
    num_frames: option.NumFrames = None,
    guidance: option.Guidance = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="First picture, for image-to-video models.")
    ] = None,
    seed: option.Seed = 0,
    dtype: option.Dtype = "auto",
    device: option.Device = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the denoiser: a slow first step.")
    ] = False,
    offload: option.Offload = False,
    recipe: option.Recipe = None,
    strict: option.Strict = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write FILE.html: sample, plan, numbers.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Generate one video or image, accelerated by a recipe."""
    from dit_accel import media
    from dit_accel.loading import Place

    media.check_suffix(out, None)
    asked.check_writable(out, report)
    choose = asked.need_recipe if strict else asked.choose_recipe
    chosen = choose(recipe, model)
    wanted = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance": guidance,
        "image": asked.read_image(image),
    }
    loaded, arguments = asked.load_model(model, Place(device, dtype, offload), wanted)
    media.check_suffix(out, loaded.output)
    asked.check_prompt(loaded, prompt)
    sample, ran = _run(loaded, chosen, prompt, arguments, seed, compile, strict)
    media.save(out, sample.frames, loaded.fps)
    if ran is not None:
        say(str(ran))
    say(f"{out}: {sample.seconds:.2f} s")
    if report is not None:
        _write_page(report, loaded, chosen, prompt, sample, ran)
        say(f"{report}: the report")


def _run(
    model: "Model",
    recipe: "Recipe | None",
    prompt: str,
    arguments: dict[str, Any],
    seed: int,
    compiled: bool,
    strict: bool,
) -> "tuple[Sample, Report | None]":
    from dit_accel import api
    from dit_accel.generate import generate as run

    handle = api.accelerate(model.pipe, recipe, strict=strict) if recipe is not None else None
    if compiled:
        api.compile(model.pipe)
    with Bars() as bars:
        sample = run(model, prompt, arguments, seed, bars.step)
    return sample, handle.report() if handle is not None else None


def _write_page(
    path: Path, model: "Model", recipe: "Recipe | None", prompt: str, sample: "Sample", ran: "Report | None"
) -> None:
    from dit_accel.compare import film
    from dit_accel.page import generation_page

    facts = {"seconds, whole pipeline": f"{sample.seconds:.2f} s"}
    facts |= {stage.replace("_", " "): f"{seconds:.2f} s" for stage, seconds in sample.stages.items()}
    title = f"{model.name} with {'the recipe ' + recipe.name if recipe else 'no recipe'}"
    page = generation_page(title, prompt, film(sample.frames, model.fps), facts, ran)
    path.write_text(page, encoding="utf-8")
