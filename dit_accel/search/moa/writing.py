"""An assignment of rules as a recipe, and as a picture."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from dit_accel.block_heads import Rules
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.method import FULLS
from dit_accel.search.plan.candidates import told
from dit_accel.search.rows import recipe_of_rows
from dit_accel.search.subject import Subject
from dit_accel.timeline import BRANCHES

FULL = "F"
LETTERS = "abcdefghijklmnopqrstuvwxyz" + "ABDEGHIJKLMNOPQRSTUVWXYZ" + "0123456789"  # C and F have a meaning

Assigned = Mapping[Key, Sequence[Sequence[Rules | None]]]  # layer -> interval -> head -> its rule, None: full


def recipe_of(assigned: Assigned, starts: Sequence[int], subject: Subject, full: str, name: str) -> Recipe:
    """The recipe of an assignment on the noise levels of a subject; it names no grid, as it fits any."""
    used = Counter(rules for rows in assigned.values() for row in rows for rules in row if rules is not None)
    letters = {rules: LETTERS[number] for number, (rules, _) in enumerate(used.most_common())}
    interval_of = [max(n for n, start in enumerate(starts) if start <= k) for k in range(len(subject.levels))]
    rows: dict[Key, list[str]] = {}
    if FULLS[full]:
        rows = {key: [FULL] * len(subject.levels) for key in subject.cross_attention()}
    for key, by_interval in assigned.items():
        texts = ["".join(FULL if r is None else letters[r] for r in row) for row in by_interval]
        rows[key] = [texts[interval] for interval in interval_of]
    choices = {FULL: {"method": "full", **FULLS[full]}} | {
        letter: {"method": "brick", "extent": rules} for rules, letter in letters.items()
    }
    made_for = {name: value for name, value in subject.made_for.items() if name != "grid"}
    idle = "" if FULLS[full] else FULL
    return recipe_of_rows(
        {str(branch): rows for branch in BRANCHES}, {}, choices, subject.levels, made_for, name, idle=idle
    )


def picture(assigned: Assigned, starts: Sequence[int], steps: int, tried: Sequence[Sequence[str]]) -> str:
    """A table of heads and intervals, and a line for each solution that was generated with, as HTML."""
    ends = [*starts[1:], steps]
    names = "".join(f"<th>steps {first} to {end - 1}</th>" for first, end in zip(starts, ends, strict=True))
    lines = "".join(
        f"<tr><td>{escape(key[1])}, head {head}</td>"
        + "".join(f"<td>{_told(row[head])}</td>" for row in by_interval)
        + "</tr>"
        for key, by_interval in assigned.items()
        for head in range(len(by_interval[0]))
    )
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in tried)
    head = "".join(f"<th>{name}</th>" for name in ("bound", "foretold errors", "speedup", "PSNR"))
    return (
        "<h2>What was chosen</h2><p class='dim'>Bricks that a head sees on each side, frames, rows and "
        "columns: a number, all of an axis, or alpha + beta n of an axis with n of them.</p>"
        f"<table><tr><th></th>{names}</tr>{lines}</table>"
        f"<h3>Solutions that were tried at the unseen size</h3><table><tr>{head}</tr>{rows}</table>"
    )


def _told(rules: Rules | None) -> str:
    return "full" if rules is None else escape(told(rules))
