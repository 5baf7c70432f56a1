"""The three branches a router chooses from, in plain PyTorch, so that gradients reach the routers before.

The methods run through `block_attention`, which has no backward. Here the same rows, keys and block lists
are attended by `scaled_dot_product_attention`; tests hold both to the same numbers. What is selected is no
function of the weights: gradients flow through the values of what is kept, as in the paper.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dit_accel import block_heads
from dit_accel.block_heads import Near, orders
from dit_accel.buckets import lay_buckets
from dit_accel.methods.attention.brick import Brick
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.methods.attention.full import Full
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind

LETTERS = "Fct"  # full, coreset, tile: the order of a router's scores
CORESETS = ("published", "keys")


@dataclass(frozen=True)
class Branches:
    """What the three letters mean.

    The tile is bricks of 128 tokens, of which 3 x 3 x 3 are seen: at an edge of the grid fewer, where the
    reference moves its window inwards.
    """

    coreset: Coreset
    tile: Brick = field(default_factory=lambda: Brick(extent=(1, 1, 1)))
    full: Full = field(default_factory=Full)

    @property
    def methods(self) -> tuple[Full, Coreset, Brick]:
        """In the order of a router's scores."""
        return self.full, self.coreset, self.tile

    def choices(self) -> dict[str, dict[str, Any]]:
        """The letters as a recipe declares them, defaults left out."""
        named = zip(LETTERS, ("full", "coreset", "brick"), self.methods, strict=True)
        return {letter: {"method": name, **_given(method)} for letter, name, method in named}


def branches_of(coreset: str, joint: bool, full: Mapping[str, Any] | None = None) -> Branches:
    """`published`: half of the queries and keys are dropped, on a `joint` attention as for HunyuanVideo.

    `keys`: only keys are dropped, and their centres have their votes: `coreset`'s own defaults.
    `full` are the parameters of full attention.
    """
    keys = "selected" if joint else "as_queries"
    dropping = Coreset() if coreset == "keys" else Coreset(queries="selected", keys=keys, reweight=False)
    return Branches(dropping, full=Full(**(full or {})))


def _given(method: Any) -> dict[str, Any]:
    """The parameters of a method that are not its defaults."""
    known = type(method).__dataclass_fields__
    return {name: value for name, value in asdict(method).items() if value != known[name].default}


def mix(visit: AttentionVisit, branches: Branches, scores: Tensor) -> Tensor:
    """All branches of a visit weighed by `scores` [B, h, 3]: [B, N, h, D]."""
    outputs = (visit.dense(), reduced(visit, branches.coreset), near(visit, branches.tile.near))
    weights = scores.to(visit.q.dtype)[:, None, :, :, None].unbind(3)  # three of [B, 1, h, 1]
    return sum(
        (weight * output for weight, output in zip(weights, outputs, strict=True)),
        start=visit.q.new_zeros(()),
    )


def reduced(visit: AttentionVisit, method: Coreset) -> Tensor:
    """`Coreset.attend`, differentiable: [B, N, h, D]."""
    buckets = lay_buckets(visit.grid, method.bucket, visit.q.device, visit.brick)
    small = method.reduce(visit, buckets)
    return visit.with_exact_text(small.every_row(_sdpa(small.q, small.k, small.v, small.bias, visit.scale)))


def near(visit: AttentionVisit, wanted: Near) -> Tensor:
    """`Brick.attend`, differentiable: one call for each block of queries over its list of keys."""
    tokens = visit.tokens()
    assert tokens.brick is None, "while training, tokens stand in the model's own order"
    plan = block_heads.plan_alone(tokens, wanted, Kind.ATTEND)
    brick = wanted.brick_on(tokens.grid)
    order, back = orders(tokens.grid, brick, tokens.num_text, tokens.text_first, tokens.q.device)
    q, k, v = (x.index_select(1, order) for x in (tokens.q, tokens.k, tokens.v))
    bias = None if tokens.bias is None else tokens.bias.index_select(2, order)
    rows, starts, pointers = plan.q_starts.tolist(), plan.k_starts.tolist(), plan.pointers.tolist()
    listed = plan.indices.tolist()
    outs: list[Tensor] = []
    for block in range(len(rows) - 1):
        blocks = listed[pointers[block] : plan.split[block]]
        keys = torch.cat([torch.arange(starts[one], starts[one + 1], device=q.device) for one in blocks])
        own = None if bias is None else bias[:, :, keys]
        outs.append(_sdpa(q[:, rows[block] : rows[block + 1]], k[:, keys], v[:, keys], own, visit.scale))
    return torch.cat(outs, dim=1).index_select(1, back)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """q [B, R, h, D] over k, v [B, M, h, D], bias [B or 1, h or 1, M]: [B, R, h, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if bias is None else bias[:, :, None].to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
