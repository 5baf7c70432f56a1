"""Heads that attend over lists of blocks: what each group of them wants, and one call for all of a site.

Tokens that stand in brick order already (`Tokens.brick`) are attended where they are: heads that are not
meant are skipped by the op, and nothing is copied. Tokens in the model's own order are put in brick order
and back, which costs a copy of q, k, v and of the output. A plan is made once for a (grid, text length, near
sets, kinds of the heads, device).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.bricks import BrickLayout, Grid, Rule, best_brick, lay_bricks
from dit_accel.errors import Unmet
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks
from dit_accel_kernels.block_attention.plan import CACHED, CACHED_LSE, EMITS

Rules = tuple[Rule, Rule, Rule]  # frames, rows, columns


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

    def brick_on(self, grid: Grid) -> Grid:
        """The brick in whose order its blocks lie."""
        return self.brick or best_brick(grid)

    def density(self, grid: Grid, num_text: int = 0) -> float:
        """Pairs of query and key in its blocks, over all pairs; text sees all and is seen by all."""
        return _density(self, grid, num_text)


@dataclass(frozen=True)
class Part:
    """What a group of heads does in a call, and what it reads or leaves behind."""

    near: Near
    kind: Kind = Kind.ATTEND
    cached: Tensor | None = None  # [B, N, h, D] in the order of the call, where the kind reads it
    cached_lse: Tensor | None = None  # [B, N, h] float32
    keep: Callable[[Tensor, Tensor | None], None] | None = None  # is given what an emitting group leaves


@dataclass(frozen=True)
class Tokens:
    """q, k, v of a call, and how their tokens stand."""

    q: Tensor  # [B, N, H, D]
    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, D]
    bias: Tensor | None  # [B or 1, H or 1, N] float32, added to the scores
    scale: float | None
    grid: Grid
    num_text: int
    text_first: bool
    brick: Grid | None  # the brick in whose order the visual tokens stand; None is the model's own order


Group = tuple[Sequence[int], Part]  # positions of heads in the call, rising, and what they do


def attend(tokens: Tokens, groups: Sequence[Group], out: Tensor) -> None:
    """Fill the heads of `groups` in out [B, N, H, D]: one call of the op for all whose bricks are equal."""
    by_brick: dict[Grid, list[Group]] = {}
    for group in groups:
        by_brick.setdefault(group[1].near.brick_on(tokens.grid), []).append(group)
    for brick, equal in by_brick.items():
        if tokens.brick is None:
            _attend_in_raster(tokens, brick, equal, out)
        elif tokens.brick == brick:
            _call(tokens, equal, out, leading=tokens.text_first)
        else:
            raise Unmet(f"its tokens stand in bricks of {tokens.brick}, its blocks are bricks of {brick}")


def _attend_in_raster(tokens: Tokens, brick: Grid, groups: Sequence[Group], out: Tensor) -> None:
    """Put the tokens in brick order, text behind them, attend, and put them back."""
    where = tokens.num_text, tokens.text_first
    order, back = orders(tokens.grid, brick, *where, tokens.q.device)
    heads = sorted(head for of, _ in groups for head in of)
    whole = len(heads) == tokens.q.shape[2]
    q, k, v = (
        (x if whole else x[:, :, heads]).index_select(1, order) for x in (tokens.q, tokens.k, tokens.v)
    )
    bias = tokens.bias
    if bias is not None:
        bias = (bias[:, heads] if bias.shape[1] > 1 else bias).index_select(2, order)
    number = {head: at for at, head in enumerate(heads)}
    moved = [([number[head] for head in of], part) for of, part in groups]
    ordered = replace(tokens, q=q, k=k, v=v, bias=bias, brick=brick)
    result = q.new_empty(q.shape)
    _call(ordered, moved, result, leading=False)
    if whole:
        torch.index_select(result, 1, back, out=out)
    else:
        out[:, :, heads] = result.index_select(1, back)


def _call(tokens: Tokens, groups: Sequence[Group], out: Tensor, leading: bool) -> None:
    """One call of the op; `leading` text stands before the bricks, else behind them."""
    kinds, pattern = [Kind.SKIP] * tokens.q.shape[2], [0] * tokens.q.shape[2]
    nears = tuple(dict.fromkeys(part.near for _, part in groups))
    for heads, part in groups:
        for head in heads:
            kinds[head], pattern[head] = part.kind, nears.index(part.near)
    plan = _plan(tokens.grid, tokens.num_text, leading, nears, tuple(kinds), tuple(pattern), tokens.q.device)
    cached, cached_lse = _cached(tokens.q, groups, kinds)
    block_attention(
        tokens.q, tokens.k, tokens.v, plan, scale=tokens.scale, cached=cached, cached_lse=cached_lse,
        key_bias=tokens.bias, out=out, lse_wanted=False,  # where a kind keeps one it is in cached_lse
    )  # fmt: skip
    for heads, part in groups:
        if part.keep is not None and part.kind in EMITS:
            assert cached is not None
            slots = _slots(kinds, heads)
            lse = None if cached_lse is None else cached_lse[:, :, slots]
            part.keep(cached[:, :, slots], lse)


def plan_alone(tokens: Tokens, near: Near, kind: Kind) -> BlockPlan:
    """The plan if all heads did the same."""
    heads, leading = tokens.q.shape[2], tokens.text_first and tokens.brick is not None
    of_heads = (kind,) * heads, (0,) * heads
    return _plan(tokens.grid, tokens.num_text, leading, (near,), *of_heads, tokens.q.device)


def _cached(q: Tensor, groups: Sequence[Group], kinds: Sequence[Kind]) -> tuple[Tensor | None, Tensor | None]:
    """What the heads read, or have to write to, in the order of the op's slots."""
    users = [(heads, part) for heads, part in groups if part.kind in CACHED]
    if not users:
        return None, None
    if len(users) == 1 and users[0][1].kind not in EMITS:  # slots rise with the heads: it is in order already
        return users[0][1].cached, users[0][1].cached_lse
    places = (*q.shape[:2], sum(kind in CACHED for kind in kinds))
    cached = q.new_empty((*places, q.shape[3]))
    needs_lse = any(kind in CACHED_LSE for kind in kinds)
    cached_lse = torch.empty(places, dtype=torch.float32, device=q.device) if needs_lse else None
    for heads, part in users:
        slots = _slots(kinds, heads)
        if part.cached is not None:
            cached[:, :, slots] = part.cached
        if part.cached_lse is not None and cached_lse is not None:
            cached_lse[:, :, slots] = part.cached_lse
    return cached, cached_lse


def _slots(kinds: Sequence[Kind], heads: Sequence[int]) -> slice | list[int]:
    """Places in `cached` of some heads; a slice, and so a view, where they follow each other."""
    slots = [sum(kind in CACHED for kind in kinds[:head]) for head in heads]
    return run_of(slots)


def run_of(numbers: Sequence[int]) -> slice | list[int]:
    """Rising numbers as a slice where none is left out: indexing by it copies nothing."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if last - first + 1 == len(numbers) else list(numbers)


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


@functools.lru_cache(maxsize=64)
def orders(
    grid: Grid, brick: Grid, num_text: int, text_first: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The place in the model's order of each token in brick order, text last, and back: int64 [N]."""
    with torch.inference_mode(False):  # kept for later calls, which may be outside of inference mode
        order = lay_bricks(grid, num_text, brick).permutation(text_first).to(device)
        return order, torch.argsort(order)


@functools.lru_cache(maxsize=256)
def _density(near: Near, grid: Grid, num_text: int) -> float:
    layout = lay_bricks(grid, num_text, near.brick_on(grid))
    blocks = _blocks(layout, near).double()
    sizes = layout.starts.diff().double()
    return float(sizes @ blocks @ sizes / sizes.sum() ** 2)


@functools.lru_cache(maxsize=256)  # the heads of a model's layers differ; what is large is shared by them
def _plan(
    grid: Grid, num_text: int, leading: bool, nears: tuple[Near, ...], kinds: tuple[Kind, ...],
    pattern: tuple[int, ...], device: torch.device,
) -> BlockPlan:  # fmt: skip
    with torch.inference_mode(False):
        return _lists(grid, num_text, leading, nears, device).for_heads(kinds, pattern)


@functools.lru_cache(maxsize=32)  # a few near sets per grid and text length; nothing of a model is held
def _lists(
    grid: Grid, num_text: int, leading: bool, nears: tuple[Near, ...], device: torch.device
) -> BlockPlan:
    """The block lists of some near sets, with one head each."""
    layout = lay_bricks(grid, num_text, nears[0].brick)
    blocks, starts = [_blocks(layout, near) for near in nears], layout.starts
    if leading and num_text:
        first = layout.text_first()
        blocks = [near[first][:, first] for near in blocks]
        starts = torch.nn.functional.pad(starts.diff()[first].cumsum(0, dtype=torch.int32), (1, 0))
    kinds = [Kind.ATTEND] * len(nears)
    return plan_blocks(blocks, starts, starts, kinds, block=layout.block, device=device)


def _blocks(layout: BrickLayout, near: Near) -> Tensor:
    """Which blocks see which: bool [blocks, blocks]."""
    if near.radius is not None:
        return layout.within_tokens(near.radius)
    assert near.extent is not None
    return layout.within_bricks(near.extent)
