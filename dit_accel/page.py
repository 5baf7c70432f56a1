"""One self-contained HTML file for a comparison or a single generation: no file beside it, no network."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from statistics import median

from dit_accel.compare import Column, Comparison
from dit_accel.machine import device_name, versions
from dit_accel.page_style import SCRIPT, STYLE
from dit_accel.plan_picture import legend, plan_picture
from dit_accel.run_report import Report
from dit_accel.stages import STAGES

TOY_WARNING = (
    "Measured on a toy model shipped for tests and demos: these numbers never stand for real weights."
)
STAGE_COLOURS = dict(zip(STAGES, ("c5", "c0", "c2", "exact"), strict=True))


def comparison_page(result: Comparison, more: str = "") -> str:
    """The page of `compare` and `demo`; of a search with `more` behind its plan, as HTML."""
    model = result.model
    warnings = ([TOY_WARNING] if model.toy else []) + result.notes
    body = [
        _cards(result),
        _list("Warnings", warnings),
        _films(result),
        f"<h2>Numbers</h2>{_numbers(result)}",
        f"<h2>Where the seconds go</h2>{_stage_bars(result.columns)}",
        _plan(result.report) if result.report else "",
        more,
    ]
    lead = f"{model.name} with the recipe {result.recipe.name}"
    return _document(lead, "Dense and accelerated, same prompts and seeds", "".join(body))


def generation_page(
    title: str,
    prompt: str,
    film: bytes,
    cards: Mapping[str, str],  # name -> value
    report: Report | None,
    warnings: Sequence[str] = (),
) -> str:
    """The page of `generate --report`."""
    notes = [*warnings, *(report.notes if report else ())]
    body = [
        f'<div class="cards">{"".join(_card(value, name) for name, value in cards.items())}</div>',
        _list("Warnings", notes),
        f'<h2>Sample</h2>{_player([film])}<div class="films">{_figure(film, prompt)}</div>',
        _plan(report) if report else "",
    ]
    return _document(title, prompt, "".join(body))


def _document(title: str, subtitle: str, body: str) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="dim">{escape(subtitle)}</p>{body}'
        f"<footer>{escape(device_name())}. {escape(libraries)}.</footer></main>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _cards(result: Comparison) -> str:
    dense, recipe = result.columns["dense"], result.columns["recipe"]
    cards = [
        _card(f"{result.speedup():.2f}x", "as fast as dense, whole pipeline", first=True),
        _card(f"{median(recipe.seconds):.2f} s", f"dense took {median(dense.seconds):.2f} s"),
        _card(_decibel(recipe), "PSNR to the dense result"),
        _card(_number(recipe.mean("ssim"), ".3f"), "SSIM to the dense result"),
    ]
    if recipe.mean("faithfulness") is not None:
        was = _number(dense.mean("faithfulness"), ".2f")
        cards.append(
            _card(_number(recipe.mean("faithfulness"), ".2f"), f"faithful to the prompt, dense {was}")
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(value: str, name: str, first: bool = False) -> str:
    kind = "card first" if first else "card"
    return f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _list(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<h2>{heading}</h2><ul class="notes">{items}</ul>' if lines else ""


def _films(result: Comparison) -> str:
    kept = min(len(column.films) for column in result.columns.values())
    parts = []
    for index, job in enumerate(result.jobs[:kept]):
        figures = "".join(
            _figure(column.films[index], f"{column.name}, {column.seconds[index]:.2f} s")
            for column in result.columns.values()
        )
        caption = f'{escape(job.prompt)} <span class="dim small">seed {job.seed}</span>'
        parts.append(f'<p class="prompt">{caption}</p><div class="films">{figures}</div>')
    left_out = len(result.jobs) - kept
    more = (
        f'<p class="dim small">{left_out} more prompts were measured and are not shown.</p>'
        if left_out
        else ""
    )
    return f"<h2>Side by side</h2>{_player(result.columns['dense'].films)}{''.join(parts)}{more}"


def _figure(film: bytes, caption: str) -> str:
    data = base64.b64encode(film).decode()
    if film.startswith(b"\x89PNG"):
        shown = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
    else:
        shown = f'<video src="data:video/mp4;base64,{data}" muted loop playsinline></video>'
    return f"<figure>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _player(films: Sequence[bytes]) -> str:
    """Controls for moving pictures only."""
    if not films or films[0].startswith(b"\x89PNG"):
        return ""
    slider = '<input type="range" id="slider" min="0" max="1000" value="0" aria-label="moment">'
    return f'<div class="player"><button id="play">Play</button>{slider}</div>'


def facts(result: Comparison) -> dict[str, list[str]]:
    """The numbers of a comparison as text: a line of names, a value for each column."""
    columns = list(result.columns.values())
    rows = {
        "Denoising steps": [str(column.steps) for column in columns],
        "Seconds, median": [f"{median(column.seconds):.3f}" for column in columns],
        "Seconds, all runs": [
            f"{min(column.seconds):.3f} to {max(column.seconds):.3f}" for column in columns
        ],
        "Speedup": [f"{result.speedup(name):.2f}x" for name in result.columns],
        "PSNR to dense": ["", *(_decibel(column) for column in columns[1:])],
        "SSIM to dense": ["", *(_number(column.mean("ssim"), ".4f") for column in columns[1:])],
        "Faithful to the prompt": [_number(column.mean("faithfulness"), ".3f") for column in columns],
        "Attention work kept": _kept(result),
        f"Memory ({result.memory_measured})": [_megabytes(column.peak()) for column in columns],
        "Memory above the start of the run": [_megabytes(column.peak("growth")) for column in columns],
    }
    return {name: values for name, values in rows.items() if any(value not in ("", "-") for value in values)}


def _kept(result: Comparison) -> list[str]:
    """The recipe's column alone has it."""
    share = result.report.attention_kept if result.report else None
    return ["-" if name != "recipe" or share is None else f"{share:.1%}" for name in result.columns]


def _numbers(result: Comparison) -> str:
    head = "".join(f"<th>{escape(column.name)}</th>" for column in result.columns.values())
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in facts(result).items()
    )
    jobs = len(result.jobs)
    said = f"{jobs} prompt{'s' if jobs > 1 else ''}, a generation each; medians; warm-up excluded."
    return f'<table><thead><tr><th></th>{head}</tr></thead>{body}</table><p class="dim small">{said}</p>'


def _stage_bars(columns: Mapping[str, Column]) -> str:
    spent = {name: column.median_stages() for name, column in columns.items()}
    longest = max(sum(each.values()) for each in spent.values()) or 1.0
    bars = []
    for name, column in columns.items():
        x, parts = 0.0, []
        for stage in STAGES:
            width = 1000 * spent[name][stage] / longest
            title = f"<title>{stage.replace('_', ' ')}: {spent[name][stage]:.3f} s</title>"
            parts.append(
                f'<rect class="{STAGE_COLOURS[stage]}" x="{x:.1f}" width="{width:.1f}" height="22">'
                f"{title}</rect>"
            )
            x += width
        bar = f'<svg viewBox="0 0 1000 22" preserveAspectRatio="none">{"".join(parts)}</svg>'
        total = sum(spent[name].values())
        bars.append(f'<div class="bar"><span>{escape(column.name)}</span>{bar}<b>{total:.2f} s</b></div>')
    key = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{colour}" width="14" height="14" rx="3"/></svg>'
        f"{stage.replace('_', ' ')}</li>"
        for stage, colour in STAGE_COLOURS.items()
    )
    return f'<ul class="legend">{key}</ul>{"".join(bars)}'


def _plan(report: Report) -> str:
    counters = "".join(
        f"<tr><td>{escape(name)}</td><td>{count}</td></tr>" for name, count in report.counters.items()
    )
    return (
        f"<h2>What ran: sites x steps</h2>{legend(report)}{plan_picture(report)}"
        "<h2>Visits by method</h2><table><thead><tr><th>method</th><th>executed</th></tr></thead>"
        f"{counters}</table>"
        f"<details><summary>The report as text</summary><pre>{escape(str(report))}</pre></details>"
    )


def _decibel(column: Column) -> str:
    if column.psnr and min(column.psnr) >= 100:
        return "identical"
    return _number(column.mean("psnr"), ".2f", " dB")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"
