"""What was picked for each layer, head and step, and the errors behind it, as a picture."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from dit_accel.plan import Key
from dit_accel.search.ditfastattn_v2.candidates import ABSENT, FULL, Menu
from dit_accel.search.ditfastattn_v2.progressive import SHARE, HeadDecisions, place_of

CELL, LEFT, TALL, GAP = 22, 190, 6, 4


def picture(
    keys: Mapping[Key, int], steps: int, menu: Menu, delta: float, error: str, decisions: HeadDecisions
) -> str:
    """A line of cells for each head of `keys` (layer -> heads), a picture for each branch, as HTML."""
    colours = {FULL: "exact"} | {each.letter: f"c{n}" for n, each in enumerate(menu.candidates)}
    names = {FULL: "full"} | {each.letter: each.name for each in menu.candidates}
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{colours[x]}" width="14" height="14" rx="3"/></svg>'
        f"<b>{x}</b> {escape(name)}</li>"
        for x, name in names.items()
    )
    cap = math.inf if error == "felt" else SHARE * delta
    branches = [b for b in ("cond", "uncond") if any(place.startswith(f"{b} ") for place in decisions.picks)]
    drawn = "".join(f"<h3>{b}</h3>{_branch(b, keys, steps, colours, cap, decisions)}" for b in branches)
    rule = (
        "so much error in the frames, their mean square, is it worth to save a layer's attention at a step"
        if error == "felt"
        else f"so much may the {error} errors of a layer's heads add up to at a step, and one head may have "
        f"{SHARE:g} times its equal share"
    )
    said = f"A line for each head. Delta {delta:g}: {rule}. Point at a cell."
    return (
        f"<h2>What was chosen, and the errors behind it</h2><p class='dim'>{said}</p>"
        f'<ul class="legend">{swatches}</ul>{drawn}'
    )


def _branch(
    branch: str, keys: Mapping[Key, int], steps: int, colours: Mapping[str, str], cap: float,
    decisions: HeadDecisions,
) -> str:  # fmt: skip
    cells: list[str] = []
    top = 0
    for key, heads in keys.items():
        place = place_of(branch, key)
        cells.append(f'<text x="{LEFT - 8}" y="{top + 10}" class="name">{escape(key[1])}</text>')
        for head, history in enumerate(decisions.histories(place, steps, heads)):
            errors = decisions.errors.get(place, {})
            for step, pick in enumerate(history):
                if pick == ABSENT:
                    continue
                said = _tried(errors.get(str(step), {}), head, cap / heads)
                title = escape(f"{key[1]}, head {head}, step {step}: {pick}{said}")
                cells.append(
                    f'<rect class="{colours[pick]}" x="{LEFT + step * CELL}" y="{top + head * TALL}" '
                    f'width="{CELL - 2}" height="{TALL - 1}"><title>{title}</title></rect>'
                )
        top += heads * TALL + GAP
    label = f"what was chosen for each layer, head and step on {branch}"
    return (
        f'<div class="plan"><svg viewBox="0 0 {LEFT + CELL * steps} {top}" role="img" '
        f'aria-label="{label}">{"".join(cells)}</svg></div>'
    )


def _tried(errors: Mapping[str, Sequence[float | None]], head: int, cap: float) -> str:
    tried = ", ".join(f"{x} {own[head]:.2e}" for x, own in errors.items() if own[head] is not None)
    allowed = f"; allowed under {cap:.2e}" if cap < math.inf else ""
    return f"; tried {tried}{allowed}" if tried else ""
