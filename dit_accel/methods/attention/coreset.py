"""Coreset: in every small bucket of tokens the keys that stand out are kept, one stands for all the others.

Source: bucketed coreset selection of VORTA, Sun et al. 2025, arXiv:2505.18809, section 3, on keys and values
    only: no query is dropped, so no output row is copied. A bucket's centre c stands for the tokens most
    similar to it, with the mean of their values and the weight of their number,

        score(c) = scale q . k_c + log n,     n = 1 + number of tokens it stands for,

    which VORTA leaves out, so that there a bucket of 12 has 6 votes. Similarity is the cosine of the
    keys after norm and RoPE. Buckets are packed like bricks: any grid. Text keys stay, text rows are exact.
Keeps: nothing.
Exact when: rho = 0, or the dropped keys of a bucket equal their centre.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.block_heads import orders
from dit_accel.bricks import Grid, lay_bricks
from dit_accel.errors import Unmet
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks, starts_of


@dataclass(frozen=True)
class Coreset:
    """Drop the share `rho` of the keys of every bucket of (frames, rows, columns) tokens."""

    rho: float = 0.5
    bucket: Grid = (2, 3, 2)

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be a share from 0 to below 1; got {self.rho}")
        if min(self.bucket) < 1 or math.prod(self.bucket) > 128:
            raise ValueError(
                f"bucket must be (frames, rows, columns) of 1 to 128 tokens together; got {self.bucket}"
            )

    any_order: ClassVar[bool] = True  # it gathers its buckets wherever their tokens stand

    @property
    def kept(self) -> int:
        """How many keys of a whole bucket are kept, its centre included."""
        return max(1, int(math.prod(self.bucket) * (1 - self.rho) + 1e-9))

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        grid, text = visit.grid, visit.num_text
        if torch.is_grad_enabled() and any(x.requires_grad for x in (visit.q, visit.k, visit.v)):
            raise Unmet("block_attention has no backward and gradients are wanted")
        total = visit.k.shape[1]
        visual = slice(text, total) if visit.text_first else slice(0, total - text)
        rest = slice(0, text) if visit.text_first else slice(total - text, total)
        tokens, held = _buckets(grid, self.bucket, visit.k.device, visit.brick)
        bias = visit.key_bias()
        k, v, weight = select(
            visit.k[:, visual], visit.v[:, visual], tokens, held, self.kept,
            None if bias is None else bias[:, :, visual],
        )  # fmt: skip
        text_bias = weight.new_zeros(*weight.shape[:2], text)
        if bias is not None:
            text_bias = text_bias + bias[:, :, rest]
        k, v = torch.cat([k, visit.k[:, rest]], dim=1), torch.cat([v, visit.v[:, rest]], dim=1)
        q = visit.q[:, visual]
        plan = _plan(q.shape[1], k.shape[1], q.shape[2], q.device)
        out, _ = block_attention(
            q, k, v, plan, scale=visit.scale, key_bias=torch.cat([weight, text_bias], dim=2)
        )
        return visit.with_exact_text(out)


def select(
    k: Tensor, v: Tensor, tokens: Tensor, held: Tensor, kept: int, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, V, h, D] -> [B, NB * kept, h, D] each, and log weights float32 [B, h, NB * kept].

    `tokens` [NB, g] are the buckets, `held` [NB, g] tells their tokens from filling; the first is the centre.
    """
    keys, values = k[:, tokens], v[:, tokens]  # [B, NB, g, h, D]
    likeness = F.cosine_similarity(keys.float(), keys[:, :, :1].float(), dim=-1)  # [B, NB, g, h]
    likeness[:, :, 0] = -torch.inf  # the centre is always kept, and first
    likeness = likeness.masked_fill(~held[None, :, :, None], torch.inf)  # filling is dropped first
    order = likeness.argsort(dim=2)
    is_held = held[None, :, :, None].expand_as(order).gather(2, order)  # [B, NB, g, h]
    gathered = order[..., None].expand(*order.shape, k.shape[3])
    keys, values = keys.gather(2, gathered), values.gather(2, gathered)
    dropped = is_held[:, :, kept:]
    count = 1 + dropped.sum(2)  # [B, NB, h]
    values, left_out = values[:, :, :kept].clone(), values[:, :, kept:]
    total = values[:, :, 0].float() + (left_out.float() * dropped[..., None]).sum(2)
    values[:, :, 0] = (total / count[..., None]).to(values.dtype)
    weight = torch.zeros(order[:, :, :kept].shape, device=k.device)
    weight[:, :, 0] = count.float().log()
    weight = weight.masked_fill(~is_held[:, :, :kept], -torch.inf)
    if bias is not None:
        at_tokens = bias[:, :, tokens].permute(0, 2, 3, 1).expand_as(order)
        weight = weight + at_tokens.gather(2, order[:, :, :kept])
    return keys[:, :, :kept].flatten(1, 2), values.flatten(1, 2), weight.flatten(1, 2).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def _buckets(
    grid: Grid, bucket: Grid, device: torch.device, brick: Grid | None = None
) -> tuple[Tensor, Tensor]:
    """Places of each bucket's tokens, centre first, and which of them are its own: [NB, g] each.

    Places are raster numbers, or those in the order of `brick`. The last bucket may be short; it is filled
    with its centre.
    """
    with torch.inference_mode(False):
        layout = lay_bricks(grid, 0, bucket)
        sizes = layout.starts.diff().long()  # [NB]
        frames, rows, columns = bucket
        middle = (frames // 2 * rows + rows // 2) * columns + columns // 2
        others = [place for place in range(math.prod(bucket)) if place != middle]
        places = torch.tensor([middle, *others]).repeat(len(sizes), 1)  # [NB, g]
        centre = torch.minimum(places[:, :1], sizes[:, None] - 1)
        # in a short bucket another token may be the centre: it gives its place to the missing middle
        places = torch.where(places == centre, middle, places)
        places[:, :1] = centre
        held = places < sizes[:, None]
        tokens = layout.order[layout.starts[:-1, None].long() + torch.where(held, places, centre)]
        tokens, held = tokens.to(device), held.to(device)
        return (tokens if brick is None else orders(grid, brick, 0, False, device)[1][tokens]), held


@functools.lru_cache(maxsize=16)
def _plan(queries: int, keys: int, heads: int, device: torch.device) -> BlockPlan:
    """Every query sees every key that is left."""
    with torch.inference_mode(False):
        q_starts, k_starts = starts_of(queries), starts_of(keys)
        everything = torch.ones(1, len(q_starts) - 1, len(k_starts) - 1, dtype=torch.bool)
        return plan_blocks(everything, q_starts, k_starts, [Kind.ATTEND] * heads, [0] * heads, device=device)
