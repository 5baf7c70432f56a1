"""What a head may do instead of full attention: near sets that fit a grid, and the kinds that use them.

A stateless candidate (`brick`, `coreset`) depends on nothing older. An anchored one (`tail`, `residual`)
completes what a full pass of the same head left behind some steps before. Besides these every head may reuse
its last output, and uncond may take cond's with the stored difference: the solver knows both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.block_heads import Near, Rules
from dit_accel.bricks import Grid, best_brick, lay_bricks
from dit_accel.registry import METHODS

DENSEST = 0.6  # of all pairs of blocks; a near set with more saves too little to be worth a choice
ALL = (0.0, 1.0)  # a rule: as many bricks as the axis has
# frames, rows, columns: from a brick alone to all around it; a head sees along time, or along space, or both
EXTENTS: tuple[Rules, ...] = ((0, 0, 0), (1, 0, 0), (ALL, 0, 0), (0, 1, 1), (1, 1, 1))
IMAGE_EXTENTS: tuple[Rules, ...] = ((0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1))


@dataclass(frozen=True)
class Candidate:
    """One choice of the menu. `density` is the share of visual block pairs that it attends."""

    method: str  # "brick", "tail", "residual" or "coreset"
    parameters: Mapping[str, Any]
    density: float

    @property
    def anchored(self) -> bool:
        """Whether it reads what a full pass left behind."""
        return self.method in ("tail", "residual")

    @property
    def passes_alone(self) -> bool:
        """Whether its output at a step takes a pass that nothing else needs."""
        return self.method in ("tail", "coreset")

    @property
    def near(self) -> Near:
        """Its near set; only a coreset has none."""
        return Near(extent=self.parameters["extent"])

    @property
    def name(self) -> str:
        """For people: "tail (0, 1, 1)"."""
        given = self.parameters.get("extent")
        return f"{self.method} {told(given)}" if given is not None else self.method

    @property
    def as_tail(self) -> str:
        """The name of what costs as much: of a residual its tail."""
        return self.name.replace("residual", "tail")

    def build(self, **more: Any) -> Any:
        """The method's instance."""
        return METHODS.get(self.method)(**self.parameters, **more)

    def __hash__(self) -> int:
        return hash((self.method, str(self.parameters)))


def told(extent: Sequence[Any]) -> str:
    """An extent for people: "(all, 1, 1)"."""
    return "(" + ", ".join("all" if axis == ALL else str(axis) for axis in extent) + ")"


def near_sets(grid: Grid, text: int = 0) -> dict[Rules, float]:
    """Extents worth trying on a grid, with the density of each; equal sets are kept once."""
    layout = lay_bricks(grid, text, best_brick(grid))
    found: dict[bytes, tuple[Rules, float]] = {}
    for extent in IMAGE_EXTENTS if grid[0] == 1 else EXTENTS:
        blocks = layout.within_bricks(extent)
        density = float(blocks.float().mean())
        if density <= DENSEST:
            found.setdefault(blocks.numpy().tobytes(), (extent, density))
    return dict(found.values())


def menu(grid: Grid, text: int = 0, coresets: bool = True) -> tuple[Candidate, ...]:
    """All candidates of a grid; `text` tokens share the sequence."""
    found = [
        Candidate(method, {"extent": extent}, density)
        for extent, density in near_sets(grid, text).items()
        for method in ("brick", "tail", "residual")
    ]
    if coresets:
        bucket = (1, 2, 2) if grid[0] == 1 else (2, 3, 2)
        kept = max(1, int(math.prod(bucket) * 0.5)) / math.prod(bucket)
        found.append(Candidate("coreset", {"bucket": bucket, "rho": 0.5}, kept))
    return tuple(found)
