"""`dit-accel compare`: dense against accelerated."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dit_accel.cli import asked
from dit_accel.cli import options as option
from dit_accel.cli.screen import Bars, Debug, results_to_stderr, say, screen
from dit_accel.errors import BadUsage

if TYPE_CHECKING:
    from dit_accel.compare import Comparison

EXAMPLES = """
**Examples**

- `dit-accel compare -m toys/wan -r toys/wan/balanced --html wan.html`
- `dit-accel compare -m ./my-pipeline -r my.toml --prompts prompts.txt --rival-steps auto --json result.json`
- `dit-accel compare -m toys/pixart -r toys/pixart/fast --num-prompts 8 --json - | jq .speedup`
"""


def compare(
    model: option.ModelName,
    recipe: option.Recipe = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option("--num-prompts", min=1, help="How many. [default: all of the file, or 2]")
    ] = None,
    seed: option.Seed = 0,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result; - is stdout.")
    ] = None,
    html: option.Html = None,
    rival_steps: Annotated[
        str | None,
        typer.Option(
            "--rival-steps", metavar="N|auto", help="Also dense with N steps; auto: in the recipe's time."
        ),
    ] = None,
    steps: option.Steps = None,
    height: option.Height = None,
    width: option.Width = None,
    num_frames: option.NumFrames = None,
    guidance: option.Guidance = None,
    negative_prompt: option.NegativePrompt = None,
    dtype: option.Dtype = "auto",
    device: option.Device = "auto",
    offload: option.Offload = False,
    warm_up: Annotated[bool, typer.Option(help="Run both once before measuring.")] = True,
    strict: option.Strict = False,
    debug: Debug = False,
) -> None:
    """Generate densely and accelerated, on the same prompts and seeds, and say what it gave and cost."""
    from dit_accel.compare import Options
    from dit_accel.compare import compare as measure
    from dit_accel.loading import Place
    from dit_accel.page import comparison_page
    from dit_accel.prompts import jobs

    wanted = {
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
    }
    options = Options(read_rival(rival_steps), strict, warm_up)
    with results_to_stderr(json_ == "-"):
        to_file = None if json_ in (None, "-") else Path(json_)
        asked.check_writable(to_file, html)
        chosen = asked.need_recipe(recipe, model)
        loaded, arguments = asked.load_model(model, Place(device, dtype, offload), wanted)
        tasks = jobs(loaded, prompts, num_prompts, seed)
        with Bars() as bars:
            result = measure(loaded, chosen, tasks, arguments, options, bars)
        screen.print(table(result))
        if html is not None:
            html.write_text(comparison_page(result), encoding="utf-8")
            say(f"{html}: the page")
        text = json.dumps(result.as_dict(), indent=2, allow_nan=False)
        if to_file is not None:
            to_file.write_text(text + "\n", encoding="utf-8")
            say(f"{to_file}: the numbers")
    if json_ == "-":
        typer.echo(text)


def read_rival(text: str | None) -> int | str | None:
    """`--rival-steps`: a number of steps, auto, or nothing."""
    if text in (None, "auto"):
        return text
    if not text.isdigit() or int(text) < 1:
        raise BadUsage(
            f'asked for --rival-steps "{text}"; it is a number of steps or auto. Give one of them.'
        )
    return int(text)


def table(result: "Comparison") -> Table:
    """The numbers for a terminal: those of the page."""
    from dit_accel.page import facts

    drawn = Table(title=f"{result.model.name}: {len(result.jobs)} prompt(s), medians", title_justify="left")
    drawn.add_column("")
    for column in result.columns.values():
        drawn.add_column(column.name, justify="right")
    for name, values in facts(result).items():
        drawn.add_row(name, *values)
    return drawn
