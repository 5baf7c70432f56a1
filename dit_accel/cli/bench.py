"""`dit-accel bench`: dense, fewer steps, every peer that is valid, and our recipes, in turn."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dit_accel.cli import asked
from dit_accel.cli import options as option
from dit_accel.cli.screen import Bars, Debug, asked_for, results_to_stderr, say, screen, warn
from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe

if TYPE_CHECKING:
    from dit_accel.bench.columns import Bench
    from dit_accel.bench.running import Benching
    from dit_accel.loading import Model

EXAMPLES = """
**Examples**

- `dit-accel bench -m toys/wan --json wan.json --plot wan.png`
- `dit-accel bench -m toys/pixart --against steps,first_block_cache,cache_dit:0.1 -r fast --num-prompts 4`
- All with the same attention: `dit-accel bench -m toys/wan --attention op --num-prompts 4`
- `dit-accel bench -m ./my-pipeline --against steps,seacache -r my.toml --dense eager --dtype bfloat16`
"""
INTERRUPTED = 130
COLUMNS = {"seconds": 2, "speedup": 2, "psnr": 1, "ssim": 3, "faithfulness": 3, "work": 2}  # digits


def bench(
    model: option.ModelName,
    against: Annotated[
        str,
        typer.Option(
            "--against",
            metavar="all|none|NAMES",
            help="Rivals, with commas; NAME or NAME:SETTING. See below.",
        ),
    ] = "all",
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", "-r", help="Repeatable; a name, a file, or none. [default: all shipped of the model]"
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    num_prompts: Annotated[
        int | None, typer.Option("--num-prompts", min=1, help="How many. [default: all of the file, or 2]")
    ] = None,
    seed: option.Seed = 0,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the result; - is stdout.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw speed against PSNR into this PNG file.")
    ] = None,
    dense: Annotated[
        str,
        typer.Option("--dense", help="eager, compiled, or auto: on a GPU the faster one, on a CPU eager."),
    ] = "auto",
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            help="model: each column's own; op: our op for all of them, so that none is ahead by it.",
        ),
    ] = "model",
    steps: option.Steps = None,
    height: option.Height = None,
    width: option.Width = None,
    num_frames: option.NumFrames = None,
    guidance: option.Guidance = None,
    negative_prompt: option.NegativePrompt = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16, or auto: the model's own, on a CPU else the faster."
        ),
    ] = "auto",
    device: option.Device = "auto",
    offload: option.Offload = False,
    warm_up: Annotated[bool, typer.Option(help="Run every column for a few steps before measuring.")] = True,
    results: option.Results = None,
    results_name: option.ResultsName = "cpu",
    debug: Debug = False,
) -> None:
    """Measure dense, fewer steps, peers and recipes in turn, on the same prompts and seeds, with quality.

    Rivals: steps (the same sampler with fewer); diffusers' first_block_cache, mag_cache, taylorseer (of the
    last projection), taylorseer_sublayers, seacache, pab and fastercache; and cache_dit, cache_dit_taylor and
    cache_dit_mask. Which of them are not valid on this model is printed with the reason.
    """
    from dit_accel.bench.form import Wanted
    from dit_accel.bench.rivals import read_against

    wanted = {
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
    }
    with results_to_stderr(json_ == "-"):
        rivals, form = read_against(against), Wanted(dense, dtype, device, attention)
        recipes = choose_recipes(recipe, model)
        to_file = None if json_ in (None, "-") else Path(json_)
        asked.check_writable(to_file, plot)
        if plot is not None:
            _check_plot(plot)
        bench = _prepared(
            model, form, offload, wanted, recipes, rivals, (prompts, num_prompts, seed), warm_up
        )
        interrupted = _run(bench)
        text = _told(bench.result, to_file, plot)
        if results is not None and bench.result.dense.seconds:
            _add_lines(bench.result, results, results_name)
    if json_ == "-":
        typer.echo(text)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def choose_recipes(names: list[str] | None, model: str) -> list[Recipe]:
    """The recipes asked for; without a word all that are shipped for the model."""
    own = asked.recipes_of(model)
    if not names:
        if not own:
            warn(f"no recipe is shipped for {model}: only dense and its rivals run. Give one with --recipe.")
        names = list(own)
    with asked_for():
        chosen = [Recipe.load(own.get(name, name)) for name in names if name != "none"]
    twice = {each.name for each in chosen if [other.name for other in chosen].count(each.name) > 1}
    if twice:
        raise BadUsage(
            f"asked to bench the recipe {', '.join(sorted(twice))} more than once; names tell rows apart. "
            "Give each once, or save one under another name."
        )
    return chosen


def _check_plot(file: Path) -> None:
    if file.suffix.lower() != ".png":
        raise BadUsage(f'asked to draw "{file.name}"; the plot is a PNG file. Change its ending to .png.')
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise BadUsage(
            f"asked to draw {file}; matplotlib is not installed. "
            "pip install 'dit_accel[plot]', or leave --plot out."
        )


def _prepared(
    name: str, wanted: Any, offload: bool, call: dict[str, Any], recipes: list[Recipe], rivals: Any,
    source: tuple[Path | None, int | None, int], warm_up: bool,
) -> "Benching":  # fmt: skip
    """The model in its fastest ordinary form, and all that will be run on it."""
    from dit_accel.bench.form import fastest
    from dit_accel.bench.running import Asked, Benching, check_recipes
    from dit_accel.loading import Place, stated_dtype
    from dit_accel.prompts import jobs

    checked: list[str] = []

    def load(dtype: str) -> tuple["Model", dict[str, Any]]:
        loaded, arguments = asked.load_model(name, Place(wanted.device, dtype, offload), call)
        if not checked:
            check_recipes(loaded, recipes)
            checked.append(dtype)
        return loaded, arguments

    file, count, seed = source
    form, model, arguments = fastest(
        wanted.candidates(stated_dtype(name)), load, lambda loaded: jobs(loaded, file, count, seed)[0], say
    )
    every = jobs(model, file, count, seed)
    what = Asked(rivals, recipes, every, _calibration(model, every, seed), warm_up)
    return Benching(model, arguments, form, what)


def _calibration(model: "Model", every: Any, seed: int) -> Any:
    """A prompt and a seed that are not benched."""
    from dit_accel.prompts import jobs

    known = {job.prompt for job in every}
    others = [job for job in jobs(model, None, len(every) + 1, seed + 500) if job.prompt not in known]
    return others[0]


def _run(bench: "Benching") -> bool:
    """Run it; whether the user stopped it, which leaves the prompts that were finished."""
    for name, why in bench.result.left_out.items():
        say(f"left out: {name}: {why}")
    with Bars() as bars:
        try:
            bench.run(bars)
        except KeyboardInterrupt:
            bench.stopped()
            warn("stopped: the rows have what was measured until then.")
            return True
    return False


def _told(result: "Bench", to_file: Path | None, plot: Path | None) -> str:
    """Table on the screen, picture, JSON; gives the JSON."""
    from dit_accel.bench.pareto import draw

    measured = result.as_dict()
    screen.print(table(measured))
    for row in measured["rows"]:
        for text in ([row["error"]] if row["error"] else []) + row.get("notes", []):
            say(f"{row['name']}: {text}")
    if plot is not None:
        draw({f"{measured['model']} on {measured['device']}": measured["rows"]}, plot)
        say(f"{plot}: speed against PSNR")
    text = json.dumps(measured, indent=2, allow_nan=False)
    if to_file is not None:
        to_file.write_text(text + "\n", encoding="utf-8")
        say(f"{to_file}: the numbers")
    return text


def _add_lines(result: "Bench", folder: Path, name: str) -> None:
    from datetime import date

    from dit_accel.results import append, lines_from
    from dit_accel.search.outcome import commit

    lines = lines_from(result.as_dict(), commit=commit(), date=f"{date.today()}")
    say(f"{append(lines, folder, name)}: {len(lines)} lines added")


def table(measured: dict[str, Any]) -> Table:
    """The rows from slow to fast; * stands where no other row is both faster and nearer to dense."""
    from dit_accel.bench.pareto import front

    best = front(measured["rows"])
    title = f"{measured['model']}: {measured['runs']} prompt(s), medians, {measured['dtype']}"
    title += ", all attention through our op" if measured["attention"] == "op" else ""
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("what ran", no_wrap=True)
    for head in ("", "seconds", "speedup", "PSNR dB", "SSIM", "fits", "work", "peak GiB"):
        drawn.add_column(head, justify="right", min_width=len(head))
    for row in sorted(measured["rows"], key=lambda row: row.get("speedup") or 0):
        peak = row.get("peak_bytes")
        told = "failed" if row["error"] else "nothing" if "changed_nothing" in row else ""
        drawn.add_row(
            escape(row["name"]),
            told or ("*" if row["name"] in best else ""),
            *(_number(row.get(name), digits) for name, digits in COLUMNS.items()),
            _number(peak and peak / 2**30, 2),
        )
    return drawn


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
