"""What DiTFastAttn picked for each layer and step, and the errors behind it, as a picture."""

from collections.abc import Sequence
from html import escape

from dit_accel.search.ditfastattn import menu
from dit_accel.search.ditfastattn.greedy import Decisions

COLOURS = {"F": "exact", "R": "c0", "W": "c2", "S": "c1", "X": "c3"}
NAMES = {
    "F": "full",
    "R": "last output reused",
    "W": "window and residual",
    "S": "uncond takes cond's",
    "X": "window, and uncond takes cond's",
}
CELL, LEFT = 22, 190


def picture(sites: Sequence[str], steps: int, delta: float, decisions: Decisions) -> str:
    """A cell for each layer and step; what was tried there shows on pointing at it."""
    layers = len(sites)
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{COLOURS[pick]}" width="14" height="14" rx="3"/></svg>'
        f"<b>{pick}</b> {name}</li>"
        for pick, name in NAMES.items()
    )
    cells: list[str] = []
    for layer, name in enumerate(sites):
        component, _, site = name.partition(".")
        own = [other for other in sites if other.startswith(f"{component}.")]
        history = decisions.history(component, own.index(name), steps)
        y = layer * 16
        cells.append(f'<text x="{LEFT - 8}" y="{y + 11}" class="name">{escape(site)}</text>')
        for step, pick in enumerate(history):
            if pick == menu.ABSENT:
                continue
            said = _tried(decisions, step, own.index(name), delta * (own.index(name) + 1) / len(own))
            cells.append(
                f'<rect class="{COLOURS[pick]}" x="{LEFT + step * CELL}" y="{y}" width="{CELL - 2}" '
                f'height="14"><title>{escape(f"{site}, step {step}: {pick}{said}")}</title></rect>'
            )
    width = LEFT + CELL * steps
    return (
        f"<h2>What was chosen, and the errors behind it</h2><p class='dim'>Delta {delta:g}; the error of a "
        "step's output to dense, |a - b|² / |a|², may be delta times the layer's place. Point at a cell.</p>"
        f'<ul class="legend">{swatches}</ul><div class="plan"><svg viewBox="0 0 {width} {layers * 16}" '
        f'role="img" aria-label="what was chosen for each layer and step">{"".join(cells)}</svg></div>'
    )


def _tried(decisions: Decisions, step: int, layer: int, threshold: float) -> str:
    if step >= len(decisions.losses) or layer >= len(decisions.losses[step]):
        return ""
    losses = decisions.losses[step][layer]
    tried = ", ".join(f"{pick} {loss:.2e}" for pick, loss in losses.items())
    return f"; tried {tried}; allowed {threshold:.2e}" if tried else ""
