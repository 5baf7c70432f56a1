"""The page of a HarmoniCa search: what each sublayer does at each step, and how sure its router is."""

from html import escape
from pathlib import Path

from dit_accel.compare import Comparison
from dit_accel.page import comparison_page
from dit_accel.search.harmonica.table import picks
from dit_accel.search.vorta.page import losses_picture
from dit_accel.timeline import BRANCHES
from dit_accel.train.harmonica.router import LETTERS, Router, certainty

COLOURS = ("exact", "c1", "c2")
NAMES = ("compute", "reuse", "forecast")
CELL, LINE, LEFT = 22, 14, 230


def harmonica_page(result: Comparison, router: Router, tau: float, folder: Path | None) -> str:
    """One self-contained file: the comparison on held-out prompts, the table, and the losses of training."""
    return comparison_page(result, more=_table(router, tau) + losses_picture(folder))


def _table(router: Router, tau: float) -> str:
    """A line for each sublayer (and branch, where they differ), a cell for each step."""
    found, scores = picks(router, tau), certainty(router)
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{colour}" width="14" height="14" rx="3"/></svg>'
        f"<b>{letter}</b> {name}</li>"
        for colour, letter, name in zip(COLOURS, LETTERS, NAMES, strict=True)
    )
    cells: list[str] = []
    y = 0
    for number, site in enumerate(router.sites):
        for column in range(router.columns):
            name = site if router.columns == 1 else f"{site} {BRANCHES[column]}"
            cells.append(f'<text x="{LEFT - 8}" y="{y + 11}" class="name">{escape(name)}</text>')
            for step in range(router.steps):
                said = f"{name}, step {step}: computes by {scores[column, step, number].item():.3f}"
                cells.append(
                    f'<rect class="{COLOURS[found[column, step, number]]}" x="{LEFT + step * CELL}" '
                    f'y="{y}" width="{CELL - 2}" height="{LINE - 2}"><title>{escape(said)}</title></rect>'
                )
            y += LINE
    return (
        "<h2>What the router chose</h2><p class='dim'>A line for each sublayer, a cell for each step, from "
        f"the noisiest on; it computes where the score is over {tau:.4g}. Point at a cell for the score.</p>"
        f'<ul class="legend">{swatches}</ul><div class="plan"><svg viewBox="0 0 '
        f'{LEFT + CELL * router.steps} {y}" role="img" aria-label="what each sublayer does at each step">'
        f"{''.join(cells)}</svg></div>"
    )
