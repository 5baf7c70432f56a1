"""The page of a search: the comparison, what was picked and why, and dense attention maps."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from dit_accel import media
from dit_accel.compare import Comparison
from dit_accel.page import comparison_page
from dit_accel.search.maps import Map, attention_maps
from dit_accel.search.subject import Subject


def write_page(html: Path, result: Comparison, subject: Subject, picture: str) -> None:
    """One self-contained file: the comparison on held-out prompts, with why the plan is as it is.

    `picture` is what was chosen and the errors behind it, as HTML; maps of a dense run are made here.
    """
    steps = sorted({len(subject.levels) * part // 4 for part in (1, 2, 3)})
    maps = attention_maps(
        subject.model, subject.jobs[0], subject.arguments, subject.levels, steps, subject.sites
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(comparison_page(result, more=picture + _maps(maps)), encoding="utf-8")


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
