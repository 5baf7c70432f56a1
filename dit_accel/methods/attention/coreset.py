"""Coreset: of every small bucket of tokens those that stand out are kept, its centre stands for the others.

Source: bucketed coreset selection of VORTA, Sun et al. 2025, arXiv:2505.18809, section 3, by the cosine of
    tokens after QK norm and RoPE:

    a query that is dropped gets the output row of its bucket's centre;
    a key that is dropped is answered for by the centre c of its bucket, with the mean of their values and

        score(c) = scale q . k_c + log n,     n = 1 + number of keys it stands for,

    the proportional attention of token merging (ToMe, Bolya et al. 2022, arXiv:2210.09461, section 3). VORTA
    has no such weight: there a bucket of 12 has 6 votes. That is `reweight = false`. As published, on Wan:
    queries = "selected", keys = "as_queries", reweight = false; on HunyuanVideo keys = "selected".
    Not copied from its code: a grid that is no whole buckets is cut there, and rejected; here any grid works.
    Text rows are computed by the model's own attention, and text keys are always kept.
Work kept: 1 - rho of the visual queries and of the visual keys, each where they are selected.
Keeps: nothing.
Exact when: rho = 0, or what is dropped of a bucket equals its centre (keys: with `reweight`).
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.bricks import Grid
from dit_accel.buckets import Buckets, Selection, lay_buckets, select
from dit_accel.errors import Slower, Unmet
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import BlockPlan, Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.block_attention.break_even import slower_than_dense


@dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of an attention call: every row of q sees every key of k."""

    q: Tensor  # [B, R, h, D]
    k: Tensor  # [B, M, h, D], visual before text
    v: Tensor  # [B, M, h, D]
    bias: Tensor | None  # [B or 1, h or 1, M], added to the scores
    queries: Selection | None  # None: all visual queries are in q

    def every_row(self, out: Tensor) -> Tensor:  # [B, R, h, D] -> [B, V, h, D]
        """A row for every visual token."""
        return out if self.queries is None else self.queries.copy_back(out)


@dataclass(frozen=True)
class Coreset:
    """Drop the share `rho` of the queries, the keys or both of every bucket of (frames, rows, columns)."""

    rho: float = 0.5
    bucket: Grid = (2, 3, 2)
    queries: Literal["all", "selected"] = "all"
    keys: Literal["all", "selected", "as_queries"] = "selected"  # "as_queries": where their queries are kept
    reweight: bool = True  # a centre has the votes of the keys that it stands for

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    any_order: ClassVar[bool] = True  # it gathers its buckets wherever their tokens stand

    def __post_init__(self) -> None:
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be a share from 0 to below 1; got {self.rho}")
        if min(self.bucket) < 1 or math.prod(self.bucket) > 128:
            raise ValueError(
                f"bucket must be (frames, rows, columns) of 1 to 128 tokens together; got {self.bucket}"
            )
        for name, known in (("queries", ("all", "selected")), ("keys", ("all", "selected", "as_queries"))):
            if getattr(self, name) not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}; got "{getattr(self, name)}"')
        if self.queries == "all" and self.keys != "selected":
            raise ValueError(
                f'queries = "all" with keys = "{self.keys}" selects nothing to drop: '
                f'give queries = "selected", or keys = "selected"'
            )

    @property
    def kept(self) -> int:
        """How many tokens of a whole bucket are kept, its centre included."""
        return max(1, int(math.prod(self.bucket) * (1 - self.rho) + 1e-9))

    def work(self, grid: Grid, num_text: int) -> float:
        """The share of all pairs of query and key that is computed; text rows are exact."""
        visual = math.prod(grid)
        total = visual + num_text
        kept = self.kept * math.prod(math.ceil(n / size) for n, size in zip(grid, self.bucket, strict=True))
        rows = visual if self.queries == "all" else kept
        keys = total if self.keys == "all" else kept + num_text
        return (rows * keys + num_text * total) / total**2

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        """Attention of the kept rows over the kept keys, a row for every token, text rows exact.

        Raises Unmet where the sequence is no grid plus text, a mask differs from query to query, or gradients
        are wanted; Slower where so much is kept that dense attention is faster.
        """
        buckets = lay_buckets(visit.grid, self.bucket, visit.q.device, visit.brick)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (visit.q, visit.k, visit.v)):
            raise Unmet("block_attention has no backward and gradients are wanted")
        plan = self._plan(visit, buckets)
        small = self.reduce(visit, buckets)
        out, _ = block_attention(
            small.q, small.k, small.v, plan, scale=visit.scale, key_bias=small.bias, lse_wanted=False
        )
        return visit.with_exact_text(small.every_row(out))

    def reduce(self, visit: AttentionVisit, buckets: Buckets) -> "Reduced":
        """The kept rows of the visual queries and the kept keys of a visit; differentiable."""
        visual, text = _rows(visit)
        q = visit.q[:, visual]
        queries = select(q, buckets, self.kept) if self.queries == "selected" else None
        k, v, bias = self._keys(visit, buckets, queries, visual, text)
        return Reduced(q if queries is None else queries.gather(q), k, v, bias, queries)

    def _plan(self, visit: AttentionVisit, buckets: Buckets) -> BlockPlan:
        """Every kept query sees every kept key; Slower where dense attention is faster."""
        kept, visual, total = len(buckets.tokens) * self.kept, len(buckets.back), visit.k.shape[1]
        rows = visual if self.queries == "all" else kept
        keys = total if self.keys == "all" else kept + visit.num_text
        plan = _everything(rows, keys, visit.q.shape[2], visit.q.device)
        if reason := slower_than_dense(visit.q, visit.k, visit.v, plan, instead_of=(visual, total)):
            raise Slower(reason)
        return plan

    def _keys(
        self, visit: AttentionVisit, buckets: Buckets, queries: Selection | None, visual: slice, text: slice
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The kept keys and their values [B, M, h, D], visual before text, and biases [B, h, M] or None."""
        bias, (B, _, h, _) = visit.key_bias(), visit.k.shape
        if self.keys == "all":
            return visit.k, visit.v, bias
        k, v = visit.k[:, visual], visit.v[:, visual]
        chosen = select(k, buckets, self.kept) if self.keys == "selected" else queries
        assert chosen is not None
        if bias is None and not self.reweight and buckets.whole:
            values, weight = chosen.gather(v), None
        else:
            bias = torch.zeros(1, 1, visit.k.shape[1], device=k.device) if bias is None else bias
            own = buckets.bias(bias[:, :, visual])
            values, weight = (
                chosen.stand_ins(v, own) if self.reweight else (chosen.gather(v), chosen.kept_bias(own))
            )
            weight = torch.cat([weight, bias[:, :, text].expand(B, h, -1)], dim=2)
        k = torch.cat([chosen.gather(k), visit.k[:, text]], dim=1)
        return k, torch.cat([values, visit.v[:, text]], dim=1), weight


def _rows(visit: AttentionVisit) -> tuple[slice, slice]:
    """The visual and the text rows of a sequence."""
    text, total = visit.num_text, visit.k.shape[1]
    if visit.text_first:
        return slice(text, total), slice(0, text)
    return slice(0, total - text), slice(total - text, total)


@functools.lru_cache(maxsize=32)  # a few shares kept per grid and text length
def _everything(queries: int, keys: int, heads: int, device: torch.device) -> BlockPlan:
    with torch.inference_mode(False):  # kept for later calls, which may be outside of inference mode
        q_starts, k_starts = starts_of(queries), starts_of(keys)
        everything = torch.ones(1, len(q_starts) - 1, len(k_starts) - 1, dtype=torch.bool)
        return plan_blocks(everything, q_starts, k_starts, [Kind.ATTEND] * heads, [0] * heads, device=device)
