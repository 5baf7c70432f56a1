"""Attention over near blocks in brick order, as the methods of this folder share it.

The tokens of one call are put in brick order, attended by `block_attention`, and put back. That is right
for every family, whatever its blocks do between two attentions, and costs a copy of q, k, v and of the output
per call. A plan is made once for a (grid, text length, near set, kind, number of heads, device).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.bricks import Grid, Rule, lay_bricks
from dit_accel.visit import AttentionVisit, Slower, Unmet
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks
from dit_accel_kernels.block_attention.break_even import slower_than_dense

Rules = tuple[Rule, Rule, Rule]  # frames, rows, columns
LOCAL = "its tokens are put in brick order and back at every call"


@dataclass(frozen=True)
class Near:
    """Which blocks a block sees: those at most `radius` tokens, or `extent` bricks, away on each axis.

    Each is a whole number or a rule [alpha, beta]: alpha + beta * n, rounded down, of an axis of n tokens or
    bricks. `brick` is its size in tokens, None the one that fits the grid.
    """

    radius: Rules | None = None
    extent: Rules | None = None
    brick: Grid | None = None

    def __post_init__(self) -> None:
        if (self.radius is None) == (self.extent is None):
            raise ValueError(
                "the near set is given by radius (in tokens) or by extent (in bricks): give one of the two"
            )
        for name in ("radius", "extent"):
            rules = getattr(self, name)
            if rules is not None and any(isinstance(rule, int) and rule < 0 for rule in rules):
                raise ValueError(f"{name} must be three numbers >= 0 (frames, rows, columns); got {rules}")
        if self.brick is not None and (min(self.brick) < 1 or math.prod(self.brick) > 128):
            raise ValueError(
                f"brick must be (frames, rows, columns) of 1 to 128 tokens together; got {self.brick}"
            )


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

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return self.anchors.attend_and_keep(visit)


@dataclass(frozen=True)
class Anchored:
    """Near is `extent` bricks or `radius` tokens on each side; what is far is at most `max_age` steps old."""

    extent: Rules | None = None
    radius: Rules | None = None
    brick: Grid | None = None
    max_age: int = 4

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
        return Anchor(self)


def attend(
    visit: AttentionVisit, near: Near, kind: Kind = Kind.ATTEND, cached: Tensor | None = None,
    cached_lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All heads of a visit by one near set and kind: [B, N, h, D].

    `cached` [B, N, h, D] and `cached_lse` [B, N, h] are in brick order, read or written as the kind says.
    Raises Unmet where the sequence is no grid plus text, a mask differs from query to query, or gradients
    are wanted; Slower where the lists are so long that dense attention is faster.
    """
    grid, (q, k, v) = visit.grid, (visit.q, visit.k, visit.v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise Unmet("block_attention has no backward and gradients are wanted")
    bias = key_bias(visit.mask, k.shape[1])
    plan, order, back = _plan(grid, visit.num_text, visit.text_first, near, kind, q.shape[2], q.device)
    if reason := slower_than_dense(q, k, v, plan):
        raise Slower(reason)
    visit.note(LOCAL)
    q, k, v = (x.index_select(1, order) for x in (q, k, v))
    out, _ = block_attention(
        q,
        k,
        v,
        plan,
        scale=visit.scale,
        cached=cached,
        cached_lse=cached_lse,
        key_bias=None if bias is None else bias.index_select(2, order),
        lse_wanted=False,  # where a kind keeps one it is in cached_lse
    )
    return out.index_select(1, back)


@functools.lru_cache(maxsize=64)  # a few near sets and kinds per grid and branch; nothing of a model is held
def _plan(
    grid: Grid, num_text: int, text_first: bool, near: Near, kind: Kind, heads: int, device: torch.device
) -> tuple[BlockPlan, Tensor, Tensor]:
    """The plan, the places of the tokens in brick order [N], and the way back [N]."""
    with torch.inference_mode(False):  # kept for later calls, which may be outside of inference mode
        layout = lay_bricks(grid, num_text, near.brick)
        if near.radius is not None:
            blocks = layout.within_tokens(near.radius)
        else:
            assert near.extent is not None
            blocks = layout.within_bricks(near.extent)
        plan = plan_blocks(
            [blocks],
            layout.starts,
            layout.starts,
            [kind] * heads,
            [0] * heads,
            block=layout.block,
            device=device,
        )
        order = layout.permutation(text_first).to(device)
        return plan, order, torch.argsort(order)


def key_bias(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask over keys as what is added to their scores: float32 [B or 1, h or 1, M]; hidden keys get -inf.

    Raises Unmet for a mask that differs from query to query.
    """
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] != 1:
        raise Unmet("its mask differs from query to query")
    rows = mask[:, :, 0].expand(-1, -1, keys)
    if rows.dtype != torch.bool:
        return rows.float()
    return torch.zeros(rows.shape, device=rows.device).masked_fill(~rows, float("-inf"))
