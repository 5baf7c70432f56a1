"""Speed against nearness to dense: which rows nobody beats in both, and the picture of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel import results
from dit_accel.errors import DitAccelError

OURS = "dit_accel"
MARKERS = "o^sDvP*Xph<>"
Rows = Sequence[Mapping[str, Any]]


def placed(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows that have a place in the picture: measured, and neither dense nor dense by another name."""
    return [
        row
        for row in rows
        if row.get("psnr") is not None
        and row.get("speedup")
        and row["name"] != "dense"
        and not row.get("changed_nothing")
    ]


def front(rows: Rows) -> set[str]:
    """Names of the rows that no other beats in speedup and PSNR, from any family."""
    points = [(row["name"], row["speedup"], row["psnr"]) for row in placed(rows)]
    return {
        name
        for name, speed, psnr in points
        if not any(s >= speed and q >= psnr and (s > speed or q > psnr) for _, s, q in points)
    }


def draw(panels: Mapping[str, Rows], file: Path) -> None:
    """A panel for each title: families of rows as lines over their settings, the front of all beneath.

    Raises DitAccelError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DitAccelError(
            f"asked to draw {file}; matplotlib is not installed ({error}). pip install 'dit_accel[plot]'"
        ) from error
    figure = Figure(figsize=(7.5, 4.6 * len(panels)), layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
    ):
        _panel(axes, title, placed(rows))
    figure.savefig(file, dpi=90)


def draw_models(lines: Sequence[results.Line], folder: Path) -> list[Path]:
    """A picture for each model that was benched, a panel for each device and shape."""
    models: dict[str, dict[str, Rows]] = {}
    for group, rows in results.groups(lines).items():
        if group.in_turn:
            models.setdefault(group.model, {})[group.title] = rows
    files = []
    for model, panels in models.items():
        files.append(folder / results.picture_of(model))
        draw(panels, files[-1])
    return files


def _panel(axes: Any, title: str, rows: Rows) -> None:
    best = sorted((row["speedup"], row["psnr"]) for row in rows if row["name"] in front(rows))
    if best:
        axes.step(*zip(*best, strict=True), where="pre", color="0.8", linewidth=6, label="nobody is better")
    families = list(dict.fromkeys(row["name"].partition(":")[0] for row in rows))
    for index, family in enumerate(families):
        points = sorted(
            (row["speedup"], row["psnr"]) for row in rows if row["name"].partition(":")[0] == family
        )
        ours = family == OURS
        axes.plot(
            *zip(*points, strict=True),
            marker="*" if ours else MARKERS[index % len(MARKERS)],
            markersize=13 if ours else 5,
            color="black" if ours else f"C{index % 10}",
            linestyle="none" if ours else "-",
            linewidth=1,
            label=family,
            zorder=3 if ours else 2,
        )
    axes.set(title=title, xlabel="times as fast as dense, whole pipeline", ylabel="PSNR to dense, dB")
    axes.grid(alpha=0.3)
    if families:
        axes.legend(fontsize=7)
