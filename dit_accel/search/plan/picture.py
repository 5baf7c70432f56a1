"""A solved plan as a picture: a line of cells for each head, with what each was foretold to cost."""

from collections.abc import Mapping, Sequence
from html import escape

from dit_accel.plan import Key
from dit_accel.search.goal import Measured
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.planning import PipelinePlan
from dit_accel.search.plan.segments import CS, FULL, REUSE, RS, Kind, LayerPlan

CELL, LEFT, TALL, GAP = 22, 190, 6, 4
MODULE, UNCOND = "the module's last output", "uncond follows cond"
COLOURS = {
    FULL: "exact", "brick": "c0", "coreset": "c1", "tail": "c2", "residual": "c3", REUSE: "c4", MODULE: "c5",
}  # fmt: skip


def picture(plan: PipelinePlan, tried: Sequence[tuple[PipelinePlan, Measured]]) -> str:
    """The plan that was taken, and all that were generated with, as HTML."""
    swatches = "".join(
        f'<li><svg viewBox="0 0 14 14"><rect class="{colour}" width="14" height="14" rx="3"/></svg>'
        f"{escape(name)}</li>"
        for name, colour in COLOURS.items()
    )
    said = (
        "A line for each head, a column for each step; a lighter cell: uncond follows cond by the stored "
        "difference. Point at a cell for its near set. Under each layer: the error that was foretold, as a "
        "share of the whole plan's."
    )
    rows = "".join(
        f"<tr><td>{each.seconds:.2f} s</td><td>{each.error:.4g}</td><td>{found['speedup']:.2f}x</td>"
        f"<td>{found['psnr']:.1f} dB</td></tr>"
        for each, found in tried
    )
    names = "<tr><th>foretold</th><th>foretold error</th><th>speedup</th><th>PSNR</th></tr>"
    tried_with = f"<h3>Plans that were tried</h3><table>{names}{rows}</table>"
    return (
        f"<h2>What was chosen, and the errors behind it</h2><p class='dim'>{said}</p>"
        f'<ul class="legend">{swatches}</ul>{_cells(plan.layers, plan.error)}{tried_with}'
    )


def _cells(layers: Mapping[Key, LayerPlan], whole: float) -> str:
    cells: list[str] = []
    top = 0
    steps = len(next(iter(layers.values())).actions)
    for (_, site), plan in layers.items():
        share = f"{plan.error / whole:.0%}" if whole else "exact"
        cells.append(f'<text x="{LEFT - 8}" y="{top + 10}" class="name">{escape(site)} {share}</text>')
        heads = len(plan.picks[0])
        for step in range(steps):
            for head in range(heads):
                colour, name, lighter = _look(plan, step, head)
                title = escape(f"{site}, head {head}, step {step}: {name}, error {plan.by_step[step]:.3g}")
                cells.append(
                    f'<rect class="{colour}" x="{LEFT + step * CELL}" y="{top + head * TALL}" '
                    f'width="{CELL - 2}" height="{TALL - 1}"{lighter}><title>{title}</title></rect>'
                )
        top += heads * TALL + GAP
    return (
        f'<div class="plan"><svg viewBox="0 0 {LEFT + CELL * steps} {top}" role="img" '
        f'aria-label="what was chosen for each layer, head and step">{"".join(cells)}</svg></div>'
    )


def _look(plan: LayerPlan, step: int, head: int) -> tuple[str, str, str]:
    """(colour, words, attribute) of a cell."""
    if plan.actions[step] == RS:
        return COLOURS[MODULE], MODULE, ""
    pick: Kind = plan.picks[step][head]
    follows = plan.actions[step] == CS or plan.follows[step][head]
    name = pick.name if isinstance(pick, Candidate) else pick
    colour = COLOURS[pick.method if isinstance(pick, Candidate) else pick]
    return colour, f"{name}, {UNCOND}" if follows else name, ' opacity="0.55"' if follows else ""
