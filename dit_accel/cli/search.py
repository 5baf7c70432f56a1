"""`dit-accel search`: find a recipe for a model, verify it, write it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli import asked
from dit_accel.cli import options as option
from dit_accel.cli.screen import Debug
from dit_accel.errors import BadUsage, nearest

METHODS = ("ditfastattn", "ditfastattn_v2", "harmonica", "moa", "plan", "timeline", "vorta")
# options that some methods take and others do not
OWN = {
    "ditfastattn": ("delta", "speedup", "psnr", "minutes", "memory_gb", "sites", "full", "near"),
    "ditfastattn_v2": (
        "delta", "speedup", "psnr", "minutes", "memory_gb", "sites", "full", "menu", "error", "interval"
    ),
    "harmonica": (
        "speedup", "minutes", "gates", "branches", "beta", "lr", "proxy", "regenerate",
        "steps_of_training", "micro_batches", "tau", "weights"
    ),
    "moa": ("speedup", "psnr", "minutes", "sites", "full", "interval", "sizes", "density"),
    "plan": ("delta", "speedup", "psnr", "minutes", "memory_gb", "sites"),
    "timeline": ("speedup",),
    "vorta": (
        "speedup", "psnr", "minutes", "full", "steps_of_training", "micro_batches", "price", "coreset",
        "temperature", "recompute", "tau", "weights"
    ),
}  # fmt: skip

EXAMPLES = """
**Examples**

- `dit-accel search -m toys/pixart --method ditfastattn --delta 0.0003 --out recipes`
- At least 1.3 times as fast, as near to dense as can be: `dit-accel search -m toys/wan --method ditfastattn
  --speedup 1.3 --minutes 10 --out recipes`
- Head by head, with our own menu, errors as the frames feel them and the fast dense kernel: `dit-accel search
  -m toys/wan --method ditfastattn_v2 --menu plain --error felt --full auto --psnr 35 --out recipes`
- Every head's kind at every step, by its price in seconds and its error in the video: `dit-accel search
  -m toys/wan --method plan --speedup 1.8 --out recipes`
- Near sets that grow with the size, found at two sizes and used at all others: `dit-accel search -m toys/wan
  --method moa --sizes 64x64x17 --sizes 48x48x33 --density 0.7 --out recipes`
- Routers over full attention, coreset and sliding tiles: `dit-accel search -m toys/pixart --method vorta
  --price latency --minutes 20 --out recipes`
- Which sublayer computes at which step, learned, with forecasts: `dit-accel search -m toys/wan --method
  harmonica --gates hard --speedup 1.8 --out recipes`
- Whole spans of steps, three recipes: `dit-accel search -m toys/pixart --method timeline --out recipes`
"""


def search(
    model: option.ModelName,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="ditfastattn: per layer and step; ditfastattn_v2: per head too; plan: per head, one budget "
            "for all; moa: per head, by rules for all sizes; vorta: per head and noise level, learned; "
            "harmonica: per sublayer and step, learned; timeline: whole steps.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder: writes OUT/MODEL/NAME.toml, .html and .state.json.")
    ] = Path("recipes"),
    name: Annotated[str | None, typer.Option("--name", help="[default: the method's]")] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta",
            help="Error allowed, |a - b|² / |a|²: of a step's output, of a layer's at a step (v2), or, as "
            "foretold, of the frames (plan).",
        ),
    ] = None,
    speedup: Annotated[float | None, typer.Option("--speedup", help="At least so many times faster.")] = None,
    psnr: Annotated[float | None, typer.Option("--psnr", help="At least so many dB to dense.")] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Budget: then the best legal recipe so far.")
    ] = None,
    near: Annotated[
        str | None,
        typer.Option(
            "--near",
            help="ditfastattn: what a window sees, band (1/8 of the tokens each side) or brick. "
            "[default: band]",
        ),
    ] = None,
    menu: Annotated[
        str | None,
        typer.Option(
            "--menu",
            help="ditfastattn_v2: v2 (as published), ours, or plain: ours without tails. [default: v2]",
        ),
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(
            "--error",
            help="ditfastattn_v2: of a head behind its projection (projected), before it (head, published) "
            "or in the frames, one price for all (felt). [default: projected]",
        ),
    ] = None,
    interval: Annotated[
        int | None,
        typer.Option(
            "--interval", help="ditfastattn_v2, moa: steps between two decisions. [default: 1; moa 5]"
        ),
    ] = None,
    full: Annotated[
        str | None,
        typer.Option(
            "--full", help="Who attends for full heads: model, or auto, our fastest. [default: model]"
        ),
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--sites", help="Layers to search, as in a recipe. [default: all]")
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--sizes", help="moa: HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES to calibrate at, once for each."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="moa: attention's work kept, at every size. [default: 0.6]"),
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option("--memory-gb", help="The most that may be stored.")
    ] = None,
    training_steps: Annotated[
        int | None,
        typer.Option(
            "--steps-of-training",
            min=1,
            help="vorta, harmonica: of the optimizer. [default: 100; harmonica 40 of whole trajectories]",
        ),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            "--micro-batches",
            min=1,
            help="vorta, harmonica: of a training step. [default: 4; harmonica 1 trajectory]",
        ),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option("--price", help="vorta: published (full attention) or latency. [default: published]"),
    ] = None,
    coreset: Annotated[
        str | None,
        typer.Option("--coreset", help="vorta: published, or keys: no query drops. [default: published]"),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="vorta: of the scores at the end. [default: 1]")
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau",
            help="vorta: full where no score is so great; harmonica: computes over it. [harmonica: 0.1]",
        ),
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(
            "--gates",
            help="harmonica: published (a blend, reuse), hard (drawn; reuse and forecast, to a budget) or "
            "hard-reuse. [default: published]",
        ),
    ] = None,
    branches: Annotated[
        str | None,
        typer.Option("--branches", help="harmonica: one decision shared, or own ones. [default: shared]"),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            "--beta", help="harmonica: published price of computing. [default: from the first slopes]"
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="harmonica: published 0.01, 20 000 steps. [default: 0.2]")
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option("--proxy", help="harmonica: image error as in its code or its paper. [default: code]"),
    ] = None,
    regenerate: Annotated[
        int | None,
        typer.Option("--regenerate", help="harmonica: training steps between two proxies. [default: 10]"),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="vorta: less memory in training, more time, same numbers.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="vorta, harmonica: routers that were trained before."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            "--num-prompts",
            min=1,
            help="Calibration prompts. [default: 2; plan 3, timeline 4, vorta, harmonica 8]",
        ),
    ] = None,
    held_out: Annotated[int, typer.Option("--held-out", min=1, help="Prompts to verify on.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the first calibration prompt.")] = 1000,
    steps: option.Steps = None,
    height: option.Height = None,
    width: option.Width = None,
    num_frames: option.NumFrames = None,
    guidance: option.Guidance = None,
    negative_prompt: option.NegativePrompt = None,
    dtype: option.Dtype = "auto",
    device: option.Device = "auto",
    offload: option.Offload = False,
    results: option.Results = None,
    results_name: option.ResultsName = "cpu",
    debug: Debug = False,
) -> None:
    """Find a recipe on calibration prompts, measure it on others, and write it with a page that shows why.

    Searching is deterministic, and an interrupted search goes on when the same command is given again.
    """
    from dit_accel.cli.searches import Given, run
    from dit_accel.loading import Place
    from dit_accel.search.outcome import Ending, own_command, split_jobs
    from dit_accel.search.pursuit import Clock

    if method not in METHODS:
        raise BadUsage(f'asked to search by "{method}"; known: {nearest(method, METHODS)}. Give one of them.')
    wanted = {
        "steps": steps,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
    }
    goals = {"delta": delta, "speedup": speedup, "psnr": psnr}
    settings = {
        "sites": sites,
        "memory_gb": memory_gb,
        "near": near,
        "menu": menu,
        "error": error,
        "interval": interval,
        "sizes": sizes,
        "density": density,
        "full": full,
        "steps_of_training": training_steps,
        "micro_batches": micro_batches,
        "price": price,
        "coreset": coreset,
        "temperature": temperature,
        "recompute": recompute or None,
        "gates": gates,
        "branches": branches,
        "beta": beta,
        "lr": lr,
        "proxy": proxy,
        "regenerate": regenerate,
        "tau": tau,
        "weights": weights,
    }
    settings = {key: value for key, value in settings.items() if value not in (None, [])}
    clock = Clock(minutes)
    _check_before_loading(method, goals | settings | {"minutes": minutes})
    loaded, arguments = asked.load_model(model, Place(device, dtype, offload), wanted)
    count = num_prompts or {"harmonica": 8, "plan": 3, "timeline": 4, "vorta": 8}.get(method, 2)
    calibration, fresh = split_jobs(loaded, prompts, count, held_out, seed)
    ending = Ending(calibration, fresh, own_command(), results, results_name)
    run(Given(method, loaded, arguments, out, name, goals, settings, clock, ending))


def _check_before_loading(method: str, given: dict[str, Any]) -> None:
    if given.get("memory_gb") is not None and not given["memory_gb"] > 0:
        raise BadUsage(
            f"asked to keep {given['memory_gb']:g} gigabytes; a search stores outputs. "
            "Give --memory-gb above 0, or leave it out."
        )
    other = [name for name, value in given.items() if value is not None and name not in OWN[method]]
    if other:
        taken = ", ".join(f"--{name.replace('_', '-')}" for name in OWN[method])
        able = [name for name, options in OWN.items() if other[0] in options]
        raise BadUsage(
            f"asked for --{other[0].replace('_', '-')} with --method {method}; it takes {taken}. "
            f"Leave the option out, or use --method {' or '.join(able)}."
        )
    if method == "vorta":
        _check_vorta(given)
    if method == "harmonica":
        _check_harmonica(given)


def _check_vorta(given: dict[str, Any]) -> None:
    from dit_accel.search.vorta.pursuit import check_routing_goal
    from dit_accel.search.vorta.routing import settings_of

    check_routing_goal(given["speedup"], given["psnr"], given.get("tau"))
    settings_of(given)
    _check_weights(given, ("steps_of_training", "micro_batches", "price", "temperature"))


def _check_harmonica(given: dict[str, Any]) -> None:
    from dit_accel.search.harmonica.pursuit import check_caching_goal
    from dit_accel.search.harmonica.training import settings_of

    check_caching_goal(settings_of(given), given["speedup"], given.get("tau"), "weights" in given)
    _check_weights(given, ("steps_of_training", "micro_batches", "beta", "lr", "proxy", "regenerate"))


def _check_weights(given: dict[str, Any], training: tuple[str, ...]) -> None:
    """Raise BadUsage where given routers are absent, or are to be trained as well."""
    file = given.get("weights")
    made = [name for name in training if name in given]
    if file is not None and (made or not file.is_file()):
        found = f"--{made[0].replace('_', '-')} is given too" if made else "there is no such file"
        raise BadUsage(
            f"asked to use the routers in {file}; {found}. Give a file of routers alone, or train some."
        )
