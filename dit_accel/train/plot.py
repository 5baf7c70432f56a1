"""A training's losses as a picture beside its log; matplotlib draws it where it is installed."""

import os
from pathlib import Path

from dit_accel.errors import DitAccelError
from dit_accel.train.log import LOG, read

PLOT = "loss.png"


def plot_losses(folder: Path) -> Path:
    """Draws every number of the folder's log over the steps into loss.png.

    Raises DitAccelError where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DitAccelError(
            f"asked to plot the losses in {folder}; matplotlib is not installed ({error}). "
            "pip install 'dit_accel[plot]', or train without a plot: the numbers are in log.jsonl."
        ) from error
    lines = read(folder / LOG)
    names = [
        key for key in dict.fromkeys(key for line in lines for key in line) if key not in ("step", "seconds")
    ]
    figure = Figure(figsize=(7, 2 * max(1, len(names))), layout="constrained")
    for axes, name in zip(
        figure.subplots(max(1, len(names)), sharex=True, squeeze=False)[:, 0], names, strict=False
    ):
        known = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*known, strict=True), linewidth=1)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    temporary = folder / f"{PLOT}.tmp"
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, folder / PLOT)
    return folder / PLOT
