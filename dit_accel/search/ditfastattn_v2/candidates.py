"""What a head may do at a step instead of attending in full, what may follow what, and how it is written.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.2. Menus:

    v2      as published: the head's last output, without a limit of age; bands with a half-width of
            V / (2 f) of V visual tokens, rounded to blocks of whole rows. In a video there are two of them:
            a band of frames, and (`reorder`) the same number of tokens as all frames of few rows.
    ours    the last output at most 2 steps old; bricks around; what is near with what is far from an
            earlier full pass, merged (`tail`) or added (`residual`), at most 4 steps old; on uncond cond's
            answer, as it is or with the stored difference of the branches, that at most 2 steps old.
    plain   those of ours for which a full pass stores nothing: anchors cost a pass over the near set each.

Text rows and columns are exact in all that attends; how much text there is shows at the visit.

A pick is a letter. The history of a head is a text with one letter for each step; "-" stands where another
denoiser ran. `tail` and `residual` complete what a full pass stored, and such a pass stores for one
candidate: the capital of its letter is that pass in a recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.bricks import Grid, lay_bricks
from dit_accel.methods.attention.base import Anchored
from dit_accel.methods.attention.full import Full
from dit_accel.methods.reuse.reuse import Reuse
from dit_accel.methods.reuse.share_branch import ShareBranch
from dit_accel.recipe_method import build_method
from dit_accel.recipe_parse import Choice, Places
from dit_accel.search.ditfastattn.menu import band, row_brick

FULL, REUSE, COPY, DIFFER, ABSENT = "F", "r", "s", "d", "-"
SHARES = (COPY, DIFFER)
IDLE = frozenset((REUSE, *SHARES, ABSENT))  # what computes nothing that a later step could read
MENUS = ("v2", "ours", "plain")
EVERYTHING = (0.0, 1.0)  # a rule: all of an axis


@dataclass(frozen=True)
class Candidate:
    """One way to answer for a head."""

    letter: str
    name: str
    choice: Mapping[str, Any]  # its row in [choices]
    method: Any
    half: float | None = None  # of a published band: the share of the visual tokens on each side

    @property
    def anchored(self) -> bool:
        """Whether it completes what a full pass stored."""
        return isinstance(self.method, Anchored)

    def gain(self, visual: int, tokens: int, density: Callable[[], float]) -> float:
        """The share of the head's attention that is saved, 0 to 1. Where a branch is shared text stays exact.

        Of a published band (V - V / (2 f))^2 / S^2 with S tokens, V of them visual; else what `density`, the
        share of the block pairs that are attended, leaves.
        """
        if isinstance(self.method, Reuse):
            return 1.0
        if isinstance(self.method, ShareBranch):
            return visual / tokens
        if self.half is None:
            return 1.0 - density()
        return (visual * (1 - self.half)) ** 2 / tokens**2


@dataclass(frozen=True)
class Menu:
    """The candidates on one grid; `left_out` are those that are something else there than they are called."""

    candidates: tuple[Candidate, ...]
    full: Full
    choices: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...]

    def of(self, letter: str) -> Candidate:
        """The candidate of a letter."""
        return next(each for each in self.candidates if each.letter == letter)

    @property
    def anchored(self) -> tuple[Candidate, ...]:
        """Those that a full pass stores for."""
        return tuple(each for each in self.candidates if each.anchored)

    def brick_on(self, grid: Grid) -> Grid | None:
        """The brick in whose order all of them may have their tokens."""
        bricks = {each.method.brick_on(grid) for each in self.candidates if hasattr(each.method, "brick_on")}
        return next(iter(bricks), None)

    @property
    def shares(self) -> bool:
        """Whether uncond may take cond's answers."""
        return any(each.letter in SHARES for each in self.candidates)

    def legal(self, letter: str, history: str, cond: str = "") -> bool:
        """Whether a pick may come after a head's history, by the rules of `dit_accel.timeline`.

        `cond` is what uncond's counterpart did up to this very step; empty for cond itself.
        """
        if letter == FULL or not history.strip(ABSENT):
            return letter == FULL
        method = self.of(letter).method
        if isinstance(method, Reuse):
            computed = max(step for step, pick in enumerate(history) if pick not in IDLE)
            return len(history) - computed <= method.max_age
        if isinstance(method, ShareBranch):
            pairs = enumerate(zip(history, cond, strict=False))
            both = [step for step, pair in pairs if not IDLE & {*pair}]
            fresh = not method.difference or (both and len(history) - both[-1] <= method.max_age)
            return bool(cond and fresh)
        if not self.of(letter).anchored:
            return True
        since = history.rfind(FULL)
        bound = {pick for pick in history[since:] if pick in {each.letter for each in self.anchored}}
        return since >= 0 and len(history) - since <= method.max_age and bound <= {letter}

    def row(self, history: str) -> str:
        """A head's letters in a recipe: capitals where a full pass stores for a later step."""
        anchored, letters = {each.letter for each in self.anchored}, ""
        for step, pick in enumerate(history):
            if pick == FULL:
                reader = next((p for p in history[step + 1 :] if p in anchored or p == FULL), FULL)
                letters += reader.upper()
            else:  # where another denoiser runs nothing is read: what makes the fewest intervals
                letters += (letters[-1:] or FULL) if pick == ABSENT else pick
        return letters


def menu_of(name: str, grid: Grid, steps: int, full: Mapping[str, Any]) -> Menu:
    """The menu of a grid. Left out is what keeps every block there, or the blocks of one before it."""
    rows = _published(grid, steps) if name == "v2" else _ours(grid)
    candidates: list[Candidate] = []
    left_out: list[str] = []
    seen: dict[Any, str] = {}
    for letter, label, choice, half in rows:
        method = build_method(_choice(letter, choice), Places("<menu>"))
        if name == "plain" and isinstance(method, Anchored):
            continue
        blocks = _blocks(method, grid)
        same = label if blocks is None else seen.setdefault((choice["method"], blocks), label)
        if blocks is not None and all(blocks):
            left_out.append(f"{label} keeps every block of {grid} tokens: left out of the menu")
        elif same != label:
            left_out.append(f"{label} keeps the blocks of {same} at {grid} tokens: left out of the menu")
        else:
            candidates.append(Candidate(letter, label, choice, method, half))
    choices = {FULL: {"method": "full", **full}} | {each.letter: each.choice for each in candidates}
    choices |= {each.letter.upper(): {**each.choice, "refresh": True} for each in candidates if each.anchored}
    return Menu(tuple(candidates), Full(**full), choices, tuple(left_out))


Row = tuple[str, str, dict[str, Any], float | None]  # letter, name, choice, half-width of a published band


def _published(grid: Grid, steps: int) -> list[Row]:
    video = grid[0] > 1
    found: list[Row] = [(REUSE, "reuse", {"method": "reuse", "max_age": steps}, None)]
    for letter, f in zip("abc", (8, 16) if video else (8, 16, 32), strict=False):
        half = 1 / (2 * f)
        found.append((letter, f"arrow_{f}", {"method": "arrow", **band(half, grid)}, half))
    for letter, f in zip("de", (8, 16) if video else (), strict=False):
        half = 1 / (2 * f)  # a band of the order in which a place's frames follow each other
        few_rows = {"radius": (EVERYTHING, (0.0, half), EVERYTHING), "brick": row_brick(grid)}
        found.append((letter, f"reorder_{f}", {"method": "arrow", **few_rows}, half))
    return found


def _ours(grid: Grid) -> list[Row]:
    own, around, column = (0, 0, 0), (1, 1, 1), (EVERYTHING, 0, 0)
    video = grid[0] > 1
    found: list[Row] = [(REUSE, "reuse", {"method": "reuse", "max_age": 2}, None)]
    for letter, label, extent in (("x", "own", own), ("y", "around", around), ("z", "column", column)):
        if video or label != "column":
            found.append((letter, f"brick_{label}", {"method": "brick", "extent": extent}, None))
    # where the near set spans time a residual was better than a tail, elsewhere a tail
    spanning = ("column", column) if video else ("around", around)
    far = (("t", "tail", "own", own), ("u", "tail", "around", around), ("w", "residual", *spanning))
    for letter, method, label, extent in far:
        found.append((letter, f"{method}_{label}", {"method": method, "extent": extent, "max_age": 4}, None))
    share = {"method": "share_branch"}
    found.append((COPY, "share", {**share, "difference": False}, None))
    found.append((DIFFER, "share_difference", {**share, "max_age": 2}, None))
    return found


def _choice(letter: str, choice: Mapping[str, Any]) -> Choice:
    parameters = {name: value for name, value in choice.items() if name != "method"}
    return Choice(letter, choice["method"], parameters)


def _blocks(method: Any, grid: Grid) -> tuple[bool, ...] | None:
    """The pairs of visual blocks that a method attends, or None for one that attends none."""
    near = getattr(method, "near", None)
    if near is None:
        return None
    layout = lay_bricks(grid, 0, near.brick)
    kept = layout.within_bricks(near.extent) if near.radius is None else layout.within_tokens(near.radius)
    return tuple(kept.flatten().tolist())
