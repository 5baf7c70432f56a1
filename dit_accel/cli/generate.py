"""`dit-accel generate`: one video or image."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli import options as option
from dit_accel.cli.screen import Bars, Debug, asked_for, screen, warn, working

if TYPE_CHECKING:
    from dit_accel.generate import Sample
    from dit_accel.loading import Model
    from dit_accel.recipe import Recipe
    from dit_accel.report import Report

EXAMPLES = """Examples:

`dit-accel generate -m toys/wan --prompt "a red ring moving left on a navy striped background" --out ring.mp4`

`dit-accel generate -m Wan-AI/Wan2.1-T2V-1.3B-Diffusers --recipe wan2.1-t2v-1.3b/balanced --prompt "a cat on a
skateboard" --height 480 --width 832 --num-frames 81 --compile --out cat.mp4 --report cat.html`

`dit-accel generate -m ./my-pipeline --recipe none --prompt "a glass of orange juice" --out juice.png`
"""


def generate(
    model: option.ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to generate.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="FILE.mp4, .gif or .png (of a video: a strip of frames).")],
    negative_prompt: option.NegativePrompt = None,
    steps: option.Steps = None,
    height: option.Height = None,
    width: option.Width = None,
    num_frames: option.NumFrames = None,
    guidance: option.Guidance = None,
    image: Annotated[Path | None, typer.Option("--image", help="Start image, for image-to-video models.")] = None,
    seed: option.Seed = 0,
    dtype: option.Dtype = "auto",
    device: option.Device = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the denoiser (slow first step).")] = False,
    offload: option.Offload = False,
    recipe: option.Recipe = None,
    strict: option.Strict = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write FILE.html: sample, plan, numbers.")] = None,
    debug: Debug = False,
) -> None:
    """Generate one video or image, accelerated by a recipe."""
    from dit_accel import media

    media.check_suffix(out, None)
    chosen = choose_recipe(recipe, model)
    asked = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance": guidance,
        "image": read_image(image),
    }
    loaded, arguments = load_model(model, device, dtype, offload, asked)
    media.check_suffix(out, loaded.output)
    with Bars() as bars:
        sample, ran = _run(loaded, chosen, prompt, arguments, seed, bars, compile, strict)
    media.check_suffix(out, "video" if len(sample.frames) > 1 else "image")
    media.save(out, sample.frames, loaded.fps)
    if ran is not None:
        screen.print(str(ran), markup=False, highlight=False)
    screen.print(f"{out}: {sample.seconds:.2f} s on {_device()}", markup=False, highlight=False)
    if report is not None:
        _write_page(report, loaded, chosen, prompt, sample, ran)
        screen.print(f"{report}: the report", markup=False, highlight=False)
    if strict and ran is not None:
        fail_on_fallback(ran)
