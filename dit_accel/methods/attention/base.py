"""What the methods of this folder share: heads that attend over near blocks in brick order.

A method says in a `Part` what its heads do. All such heads of a site go in one call of `block_attention`
(`block_heads.py`); `attend` runs the heads of one visit alone.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import block_heads
from dit_accel.block_heads import Near, Part, Rules
from dit_accel.bricks import Grid
from dit_accel.errors import Slower, Unmet
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind
from dit_accel_kernels.block_attention.break_even import slower_than_dense

LOCAL = "its tokens are put in brick order and back at every call"


@dataclass(frozen=True)
class Anchor:
    """A full pass through the op that stores what `anchors` completes at later steps.

    The timeline puts it where nothing young enough is stored; it counts as `anchor` in the report and stands
    as "." in its rows: exact attention, though not the model's own call.
    """

    anchors: Any  # the method that reads what is stored

    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names under which it stores."""
        return self.anchors.keeps

    def brick_on(self, grid: Grid) -> Grid:
        """The brick in whose order its tokens may stand."""
        return self.anchors.brick_on(grid)

    def part(self, visit: AttentionVisit) -> Part:
        """Full attention that leaves behind what the anchored method reads."""
        return self.anchors.anchor_part(visit)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.attend_blocks(self.part(visit))


@dataclass(frozen=True)
class Anchored:
    """Near is `extent` bricks or `radius` tokens on each side; what is far is at most `max_age` steps old.

    With `refresh` the step is an anchor even where something young enough is stored: a full pass for the
    same choice without `refresh`, which reads it at later steps.
    """

    extent: Rules | None = None
    radius: Rules | None = None
    brick: Grid | None = None
    max_age: int = 4
    refresh: bool = False

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_age < 0:
            raise ValueError(f"max_age must be a number of steps >= 0; got {self.max_age}")
        _ = self.near  # checks the near set

    @property
    def near(self) -> Near:
        return Near(self.radius, self.extent, self.brick)

    @property
    def anchor(self) -> Anchor:
        """What runs where nothing young enough is stored."""
        return Anchor(replace(self, refresh=False))

    def brick_on(self, grid: Grid) -> Grid:
        """The brick in whose order its tokens may stand."""
        return self.near.brick_on(grid)

    def work(self, grid: Grid, num_text: int) -> float:
        """The share of all pairs of query and key that is computed."""
        return self.near.density(grid, num_text)


def check(visit: AttentionVisit, near: Near, kind: Kind = Kind.ATTEND) -> None:
    """What can be known before a call; note where tokens have to be put in brick order for this call alone.

    Raises Unmet where the sequence is no grid plus text, a mask differs from query to query, or gradients are
    wanted; Slower where the lists are so long that dense attention is faster.
    """
    if visit.brick not in (None, near.brick_on(visit.grid)):
        raise Unmet(f"its tokens stand in bricks of {visit.brick}, its blocks are other bricks")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (visit.q, visit.k, visit.v)):
        raise Unmet("block_attention has no backward and gradients are wanted")
    plan = block_heads.plan_alone(visit.tokens(), near, kind)
    if reason := slower_than_dense(visit.q, visit.k, visit.v, plan):
        raise Slower(reason)
    if visit.brick is None:
        visit.note(LOCAL)
