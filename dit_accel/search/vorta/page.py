"""The page of a VORTA search: which branch each head takes at each step, and how sure its router is."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np

from dit_accel.compare import Comparison
from dit_accel.page import comparison_page
from dit_accel.search.vorta.table import letters_of
from dit_accel.train.plot import PLOT
from dit_accel.train.vorta.branches import LETTERS

COLOURS = ("exact", "c1", "c2")  # full, coreset, tile
NAMES = ("full", "coreset", "sliding tile")
CELL, LINE, LEFT = 22, 9, 190


def vorta_page(
    result: Comparison, table: Mapping[str, np.ndarray], tau: float | None, costs: tuple[float, ...],
    folder: Path | None,
) -> str:  # fmt: skip
    """One self-contained file: the comparison on held-out prompts, the table, and the losses of training."""
    return comparison_page(result, more=_table(table, tau, costs) + losses_picture(folder))


def _table(table: Mapping[str, np.ndarray], tau: float | None, costs: tuple[float, ...]) -> str:
    """A line for each head of each layer, a cell for each step; pointing at one shows its scores."""
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{colour}" width="14" height="14" rx="3"/></svg>'
        f"<b>{letter}</b> {name}, {cost:.2f} of the seconds</li>"
        for colour, letter, name, cost in zip(COLOURS, LETTERS, NAMES, costs, strict=True)
    )
    cells: list[str] = []
    y = 0
    for site, scores in table.items():
        picks = letters_of(scores, tau)
        cells.append(f'<text x="{LEFT - 8}" y="{y + 11}" class="name">{escape(site)}</text>')
        for head in range(scores.shape[1]):
            for step in range(len(scores)):
                said = ", ".join(f"{x} {s:.2f}" for x, s in zip(LETTERS, scores[step, head], strict=True))
                cells.append(
                    f'<rect class="{COLOURS[picks[step, head]]}" x="{LEFT + step * CELL}" y="{y}" '
                    f'width="{CELL - 2}" height="{LINE - 1}"><title>'
                    f"{escape(f'{site}, head {head}, step {step}: {said}')}</title></rect>"
                )
            y += LINE
        y += LINE // 2 + 2
    width = LEFT + CELL * max(len(scores) for scores in table.values())
    threshold = "no threshold" if tau is None else f"full where no score is at least {tau:g}"
    return (
        "<h2>What the routers chose</h2><p class='dim'>A line for each head, a cell for each step, from the "
        f"noisiest on; {threshold}. Point at a cell for the scores.</p>"
        f'<ul class="legend">{swatches}</ul><div class="plan"><svg viewBox="0 0 {width} {y}" role="img" '
        f'aria-label="the branch of each head at each step">{"".join(cells)}</svg></div>'
    )


def losses_picture(folder: Path | None) -> str:
    """The plot of the training, where there is one."""
    file = None if folder is None else folder / PLOT
    if file is None or not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f"<h2>Training</h2><img alt='losses over the steps' src='data:image/png;base64,{data}'>"
