"""`dit-accel demo`: one video, dense and accelerated, with a page to look at."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import asked
from dit_accel.cli import options as option
from dit_accel.cli.compare import table
from dit_accel.cli.screen import Bars, Debug, say, screen


def demo(
    model: option.ModelName = "toys/wan",
    recipe: option.Recipe = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="[default: a held-out caption]")
    ] = None,
    seed: option.Seed = 0,
    steps: option.Steps = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the page, the videos and the numbers.")
    ] = Path("demo"),
    debug: Debug = False,
) -> None:
    """Generate a video densely and accelerated on a shipped toy, and say what it gave and cost.

    Writes index.html, dense.mp4, recipe.mp4 and result.json. Example: `dit-accel demo --out /tmp/demo`
    """
    from dit_accel.compare import Job, Options, compare
    from dit_accel.loading import Place
    from dit_accel.page import comparison_page
    from dit_accel.prompts import jobs

    asked.check_writable(out / "index.html")
    chosen = asked.need_recipe(recipe, model)
    loaded, arguments = asked.load_model(model, Place(), {"steps": steps})
    tasks = [Job(prompt, seed)] if prompt else jobs(loaded, None, 1, seed)
    say(f"{model} with {chosen.name}: {tasks[0].prompt}")
    with Bars() as bars:
        result = compare(loaded, chosen, tasks, arguments, Options(rival_steps="auto"), bars)
    page = out / "index.html"
    page.write_text(comparison_page(result), encoding="utf-8")
    for name, column in result.columns.items():
        film = column.films[0]
        (out / name).with_suffix(".png" if film.startswith(b"\x89PNG") else ".mp4").write_bytes(film)
    (out / "result.json").write_text(
        json.dumps(result.as_dict(), indent=2, allow_nan=False), encoding="utf-8"
    )
    screen.print(table(result))
    for note in result.notes:
        say(f"note: {note}")
    say(f"Open {page.resolve()} in a browser.")
