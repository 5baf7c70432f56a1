"""Rules for the extent of a near set: alpha + beta * n bricks on an axis of n, told apart by what they keep.

Source: MoA, Fu et al. 2024, arXiv:2406.14909, section 3.1, there for the one axis of a text; here an axis of
a grid has its own. A size shows only a few distinct extents, and rules that agree at all calibrated sizes
cannot be told apart: of those the simplest stands for all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dit_accel.block_heads import Rules
from dit_accel.bricks import Grid, Rule, best_brick, lay_bricks, reach
from dit_accel.search.plan.candidates import ALL, Candidate

BETAS = tuple(eighth / 8 for eighth in range(1, 9))
ALPHAS = (1, -1, 2, -2)
LONGEST = 64  # bricks on an axis that a whole extent is tried up to
MOST = 60  # rules in all: each is scored at every head and step, and has a letter in the recipe
DENSEST = 0.95  # of all pairs of blocks, at every size; what keeps more is full attention


def _simplest_first(longest: int) -> Iterator[Rule]:
    """All of an axis, then whole numbers, then shares of it, then shares and some bricks more or less."""
    yield ALL
    yield from range(min(longest, LONGEST))
    yield from ((0.0, beta) for beta in BETAS[:-1])
    yield from ((float(alpha), beta) for alpha in ALPHAS for beta in BETAS)


def axis_rules(counts: Sequence[int]) -> list[Rule]:
    """Rules of an axis that has `counts[s]` bricks at size s: no two keep the same at all sizes."""
    found: dict[tuple[int, ...], Rule] = {}
    for rule in _simplest_first(max(counts)):
        found.setdefault(tuple(min(reach(rule, n), n - 1) for n in counts), rule)
    return list(found.values())


def _thinned(axes: Sequence[Sequence[Rule]], counts: Sequence[int]) -> list[list[Rule]]:
    """So few rules of each axis that all their combinations are `MOST`, from its narrowest to its widest."""
    ordered = [
        sorted(rules, key=lambda rule, n=n: (min(reach(rule, n), n - 1), rule == ALL))
        for rules, n in zip(axes, counts, strict=True)
    ]
    sizes = [len(rules) for rules in axes]
    while math.prod(sizes) > MOST:
        sizes[sizes.index(max(sizes))] -= 1
    places = [
        np.linspace(0, len(rules) - 1, size).round().astype(int)
        for rules, size in zip(ordered, sizes, strict=True)
    ]
    return [[rules[place] for place in kept] for rules, kept in zip(ordered, places, strict=True)]


def elastic_rules(grids: Sequence[Grid]) -> list[Rules]:
    """Rules for all axes that differ on these grids and leave something out on one of them at least."""
    counts = [[math.ceil(n / size) for n, size in zip(grid, best_brick(grid), strict=True)] for grid in grids]
    axes = _thinned([axis_rules(of_axis) for of_axis in zip(*counts, strict=True)], counts[0])
    found: dict[bytes, Rules] = {}
    for frames, rows, columns in itertools.product(*axes):
        rules: Rules = frames, rows, columns
        kept = [lay_bricks(grid, 0, best_brick(grid)).within_bricks(rules).numpy() for grid in grids]
        if min(float(blocks.mean()) for blocks in kept) <= DENSEST:
            found.setdefault(b"|".join(blocks.tobytes() for blocks in kept), rules)
    return list(found.values())


def menu_at(rules: Sequence[Rules], grid: Grid, text: int) -> tuple[tuple[Candidate, ...], list[int]]:
    """(what is scored on a grid, for each rule the number of its candidate).

    Rules that keep the same blocks there are one candidate.
    """
    layout = lay_bricks(grid, text, best_brick(grid))
    known: dict[bytes, int] = {}
    candidates: list[Candidate] = []
    places: list[int] = []
    for extent in rules:
        blocks = layout.within_bricks(extent).numpy()
        if blocks.tobytes() not in known:
            known[blocks.tobytes()] = len(candidates)
            candidates.append(Candidate("brick", {"extent": extent}, float(np.mean(blocks))))
        places.append(known[blocks.tobytes()])
    return tuple(candidates), places
