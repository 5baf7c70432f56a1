"""DiTFastAttn's menu of one attention layer at one step, what may follow what, and its rows in a recipe.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552, section 3. A pick is one letter:

    F full        the layer's own attention, which also leaves a residual
    R reuse       the module's last output answers (attention sharing across timesteps)
    W window      near tokens, and the residual of the last full pass added (window with residual sharing)
    S share       cond computes in full, uncond takes its output (attention sharing across CFG)
    X window and share   cond takes W, uncond its output

A history is a text with one pick for each step of the schedule; "-" stands where another denoiser ran.

Where only visual tokens attend, sharing copies the module's output, as published. In a joint attention the
branches' texts differ, so that sharing copies the heads of visual tokens and text stays exact. A window of
uncond after a share needs a full pass first: what uncond stored is older than what it last showed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.bricks import BLOCK, Grid
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.rows import recipe_of_rows

FULL, REUSE, WINDOW, SHARE, WINDOW_SHARE = "F", "R", "W", "S", "X"
ABSENT = "-"
MENU = (REUSE, WINDOW_SHARE, WINDOW, SHARE)  # strongest first, as published
NEARS = ("band", "brick")


@dataclass(frozen=True)
class Rows:
    """One layer's letters, one for each step: the module's on the timeline, and those of its heads."""

    cond: str
    uncond: str
    heads_cond: str
    heads_uncond: str

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(
            self.cond + other.cond,
            self.uncond + other.uncond,
            self.heads_cond + other.heads_cond,
            self.heads_uncond + other.heads_uncond,
        )


def legal(pick: str, history: str, guided: bool) -> bool:
    """Whether a pick may come after a history; `guided`: there are two branches."""
    if not history.strip(ABSENT):
        return pick == FULL
    if pick in (SHARE, WINDOW_SHARE):
        return guided
    if pick == WINDOW:
        return history.rfind(FULL) > max(history.rfind(SHARE), history.rfind(WINDOW_SHARE))
    return True


def rows_of(history: str, joint: bool, storing: bool = False) -> Rows:
    """The letters of a history: C r s on the timeline; F A w h for heads (h shares, A is full and stores).

    A full pass stores where a window reads it before the next one; with `storing` every full pass does.
    """
    shared = False  # whether uncond's last answer was cond's
    uncond = ""
    for pick in history:
        shared = pick in (SHARE, WINDOW_SHARE) or (shared and pick in (REUSE, ABSENT))
        if pick == REUSE:
            uncond += "s" if shared and not joint else "r"
        else:
            uncond += "s" if pick in (SHARE, WINDOW_SHARE) and not joint else "C"
    return Rows(
        "".join("r" if pick == REUSE else "C" for pick in history),
        uncond,
        _heads(history, storing, full=FULL + SHARE, window=WINDOW + WINDOW_SHARE),
        _heads(history, storing, full=FULL, window=WINDOW, share=SHARE + WINDOW_SHARE if joint else ""),
    )


def _heads(history: str, storing: bool, full: str, window: str, share: str = "") -> str:
    """Letters of the heads on one branch, whose picks are of three kinds."""
    letters = ""
    for step, pick in enumerate(history):
        if pick in full:
            later = next((p for p in history[step + 1 :] if p in full + window), FULL)
            letters += "A" if storing or later in window else "F"
        elif pick in window:
            letters += "w"
        elif pick in share:
            letters += "h"
        else:  # not reached: what makes the fewest intervals
            letters += letters[-1:].replace("A", "w") or "F"
    return letters


def future(joint: bool, windows: bool, shared: bool) -> Rows:
    """Three steps that read all that a step can leave behind, and in which the branches differ.

    A search appends them to what it has decided: values are then kept, and always branch by branch.
    `shared`: uncond's last answer was cond's.
    """
    near = "w" if windows else "F"
    if joint:
        return Rows("rCC", "rCC", f"F{near}F", f"F{near}h")
    return Rows("rCC", "sCs" if shared else "rCs", f"F{near}F", f"F{near}F")


def idle(steps: int) -> Rows:
    """Steps at which the model does its own work."""
    return Rows("C" * steps, "C" * steps, "F" * steps, "F" * steps)


def apart(joint: bool) -> Rows:
    """One step in which the branches differ and nothing older is read: evaluations keep nothing."""
    return Rows("C", "C", "F", "h") if joint else Rows("C", "s", "F", "F")


def near_set(name: str, grid: Grid) -> dict[str, Any]:
    """Parameters of `residual`: the published band, half-width 1/8 of the tokens, or the bricks around."""
    if name == "brick":
        return {"extent": (1, 1, 1)}
    return band(1 / 8, grid)


def band(half: float, grid: Grid) -> dict[str, Any]:
    """The near set of a raster band: so great a share of the tokens on each side.

    Rounded to whole rows of an image or whole frames of a video, and outwards to blocks of whole rows.
    """
    each_side, all_of = (0.0, half), (0.0, 1.0)
    radius = (0, each_side, all_of) if grid[0] == 1 else (each_side, all_of, all_of)
    return {"radius": radius, "brick": row_brick(grid)}


def row_brick(grid: Grid) -> Grid:
    """Blocks of whole rows of one frame: consecutive tokens, as in the kernels behind the papers."""
    _, rows, columns = grid
    width = min(columns, BLOCK)
    return 1, max(1, min(rows, BLOCK // width)), width


def recipe_of(
    rows: Mapping[Key, Rows], levels: Sequence[float], near: Mapping[str, Any], made_for: Mapping[str, Any],
    name: str = "ditfastattn", memory_gb: float | None = None, full: Mapping[str, Any] | None = None,
) -> Recipe:  # fmt: skip
    """The recipe of some layers' rows on a schedule with these noise levels; `full` are its parameters.

    Raises BadUsage where two steps have one noise level.
    """
    timeline = {b: {key: getattr(row, b) for key, row in rows.items()} for b in ("cond", "uncond")}
    heads = {b: {key: getattr(row, f"heads_{b}") for key, row in rows.items()} for b in ("cond", "uncond")}
    choices = _choices(len(levels), near, full or {})
    idle = "" if full else "F"  # a backend of ours is something else than the model's own
    return recipe_of_rows(heads, timeline, choices, levels, made_for, name, memory_gb, idle)


def _choices(steps: int, near: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ages are those of the paper: without a limit."""
    residual = {"method": "residual", **near, "max_age": steps}
    return {
        "C": {"method": "compute"},
        "r": {"method": "reuse", "max_age": steps},
        "s": {"method": "share_branch", "difference": False},
        "F": {"method": "full", **full},
        "A": {**residual, "refresh": True},
        "w": residual,
        "h": {"method": "share_branch", "difference": False},
    }
