"""What a run did, as a picture: a row for each site, a column for each step, a colour for each choice.

The picture is one inline SVG for each branch. Heads of an attention site are thin lines of its row. A cell
whose choice was not the planned one is framed; an empty cell was not visited, as a reused span does not run
its inside.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby

from dit_accel.run_report import Report, Row

LEFT, TOP, WIDTH = 190, 34, 980  # room for names and levels; the whole picture, in pixels
ROW, GAP = 13, 2  # smallest height of a row and the gap under it
MANY_HEADS = 8  # more than these get thinner lines
COLOURS = 9  # letter colours of the style sheet
EXACT = ("full", "compute", "the model's own")


def letter_colours(legend: Mapping[str, str]) -> dict[str, str]:
    """A class of the style sheet for every letter: `exact` for the model's own work, c0... for the others."""
    exact = {letter for letter, text in legend.items() if text.split("(")[0].lower() in EXACT}
    others = [letter for letter in legend if letter not in exact]
    return dict.fromkeys(exact, "exact") | {
        letter: f"c{index % COLOURS}" for index, letter in enumerate(others)
    }


def legend(report: Report) -> str:
    """The letters, their colours and what they stand for."""
    colours = letter_colours(report.legend)
    items = "".join(
        _swatch(colours[letter], f"<b>{escape(letter)}</b> {escape(text)}")
        for letter, text in report.legend.items()
    )
    none, other = _swatch("none", "not visited"), _swatch("other", "not what was planned")
    marks = none + (other if any(_differs(row) for row in report.rows) else "")
    return f'<ul class="legend">{items}{marks}</ul>'


def _swatch(colour: str, meaning: str) -> str:
    square = (
        f'<svg viewBox="0 0 14 14"><rect class="{colour}" x="1" y="1" width="12" height="12" rx="2"/></svg>'
    )
    return f"<li>{square}{meaning}</li>"


def plan_picture(report: Report) -> str:
    """The SVGs of all branches, each under its name."""
    branches: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        branches[row.branch].append(row)
    colours = letter_colours(report.legend)
    return "".join(
        f'<h3>{escape(branch)}</h3><div class="plan">{_branch(rows, report.levels, colours)}</div>'
        for branch, rows in branches.items()
    )


def _branch(rows: Sequence[Row], levels: Sequence[float], colours: Mapping[str, str]) -> str:
    steps = max((len(row.ran) for row in rows), default=0)
    cell = (WIDTH - LEFT) / max(1, steps)
    parts, top = [_axis(steps, levels, cell)], TOP
    for row in rows:
        heads = max((len(letters) for letters in row.ran), default=1)
        height = max(ROW, heads * (4 if heads <= MANY_HEADS else 2))
        parts.append(_row(row, top, height, cell, colours))
        top += height + GAP
    return (
        f'<svg viewBox="0 0 {WIDTH} {top}" role="img" aria-label="what ran at each site and step" '
        f'style="min-width:{min(WIDTH, LEFT + 9 * steps)}px">{"".join(parts)}</svg>'
    )


def _axis(steps: int, levels: Sequence[float], cell: float) -> str:
    """Step numbers and noise levels above the columns."""
    every = max(1, -(-40 // int(max(1, cell))))
    marks = [
        f'<text x="{LEFT - 8}" y="{y}" class="name">{name}</text>'
        for y, name in ((12, "step"), (26, "noise"))
    ]
    for step in range(0, steps, every):
        x = LEFT + (step + 0.5) * cell
        marks.append(f'<text x="{x:.1f}" y="12">{step}</text>')
        if step < len(levels):
            marks.append(f'<text x="{x:.1f}" y="26" class="dim">{levels[step]:.2f}</text>')
    return "".join(marks)


def _row(row: Row, top: float, height: float, cell: float, colours: Mapping[str, str]) -> str:
    width = len(row.ran) * cell
    paths: dict[str, list[str]] = defaultdict(list)
    for letter, x, y, run, tall in _patches(row, height):
        paths[letter].append(
            f"M{LEFT + x * cell:.1f} {top + y:.1f}h{run * cell:.1f}v{tall:.1f}h{-run * cell:.1f}z"
        )
    drawn = "".join(
        f'<path class="{colours.get(letter, "exact")}" d="{"".join(each)}"/>'
        for letter, each in paths.items()
    )
    frames = "".join(
        f'<rect class="other" x="{LEFT + step * cell + 0.75:.1f}" y="{top + 0.75:.1f}" '
        f'width="{cell - 1.5:.1f}" height="{height - 1.5:.1f}"/>'
        for step in _differs(row)
    )
    ran = " ".join(letters or "-" for letters in row.ran)
    return (
        f"<g><title>{escape(f'{row.site} ({row.branch}): {ran}')}</title>"
        f'<text x="{LEFT - 8}" y="{top + height / 2 + 3.5:.1f}" class="name">{escape(row.site)}</text>'
        f'<rect class="none" x="{LEFT}" y="{top}" width="{width:.1f}" height="{height}"/>{drawn}{frames}</g>'
    )


def _patches(row: Row, height: float) -> Iterator[tuple[str, int, float, int, float]]:
    """Rectangles of one letter: (letter, first step, y, steps, height), neighbours in a line joined."""
    lines = max((len(letters) for letters in row.ran), default=1) or 1
    tall = height / lines
    for line in range(lines):
        step = 0
        # one letter stands for all heads of its step
        across = [letters[line] if len(letters) == lines else letters[:1] for letters in row.ran]
        for letter, run in groupby(across):
            steps = len(list(run))
            if letter:
                yield letter, step, line * tall, steps, tall
            step += steps


def _differs(row: Row) -> list[int]:
    """Steps that were visited and ran something else than planned."""
    pairs = enumerate(zip(row.planned, row.ran, strict=False))
    return [step for step, (planned, ran) in pairs if ran and ran != planned]
