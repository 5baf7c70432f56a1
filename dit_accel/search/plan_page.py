"""The page of a search: the plan layer by layer, the errors behind every pick, and dense attention maps."""

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from dit_accel import media
from dit_accel.compare import Comparison
from dit_accel.page import comparison_page
from dit_accel.search import menu
from dit_accel.search.ditfastattn import Subject
from dit_accel.search.greedy import Decisions
from dit_accel.search.maps import Map

COLOURS = {"F": "exact", "R": "c0", "W": "c2", "S": "c1", "X": "c3"}
NAMES = {
    "F": "full",
    "R": "last output reused",
    "W": "window and residual",
    "S": "uncond takes cond's",
    "X": "window, and uncond takes cond's",
}
CELL, LEFT = 22, 190


def search_page(
    result: Comparison, subject: Subject, delta: float, decisions: Decisions, maps: Sequence[Map]
) -> str:
    """One self-contained file: the comparison on held-out prompts, with why the plan is as it is."""
    return comparison_page(result, more=_picks(subject, delta, decisions) + _maps(maps))


def _picks(subject: Subject, delta: float, decisions: Decisions) -> str:
    """A cell for each layer and step; what was tried there shows on pointing at it."""
    layers = len(subject.sites)
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{COLOURS[pick]}" width="14" height="14" rx="3"/></svg>'
        f"<b>{pick}</b> {name}</li>"
        for pick, name in NAMES.items()
    )
    cells: list[str] = []
    for layer, name in enumerate(subject.sites):
        component, _, site = name.partition(".")
        own = [other for other in subject.sites if other.startswith(f"{component}.")]
        history = decisions.history(component, own.index(name), len(subject.levels))
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
    width = LEFT + CELL * len(subject.levels)
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


def _maps(maps: Sequence[Map]) -> str:
    """A strip of heads for each layer and step."""
    figures: list[str] = []
    for each in maps:
        strip = np.concatenate([_square(weights) for weights in each.weights], axis=1)
        data = base64.b64encode(media.png(np.repeat(strip[..., None], 3, axis=2))).decode()
        near = " ".join(f"{share:.2f}" for share in each.near)
        title = f"{each.site}, step {each.step}: near {near}"
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(title)}">'
            f"<figcaption>{escape(title)}</figcaption></figure>"
        )
    said = (
        "A dense run of the first calibration prompt, conditional branch: a square for each head, queries "
        "from top to bottom, keys from left to right, both in raster order. Near is the share of a head's "
        "attention within 1/8 of the tokens on each side: what a window computes anew at every step."
    )
    shown = f"<div class='films'>{''.join(figures)}</div>"
    return f"<h2>What the heads look at</h2><p class='dim'>{said}</p>{shown}"


def _square(weights: np.ndarray) -> np.ndarray:
    """One head's map in [0, 1], with a light edge; square roots show what is faint."""
    shown = np.sqrt(weights / max(float(weights.max()), 1e-12))
    shown[-1, :] = shown[:, -1] = 0.5
    return shown
