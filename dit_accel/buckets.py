"""Small buckets of neighbouring tokens, and which of their tokens are kept to stand for the others.

Source: bucketed coreset selection of VORTA, Sun et al. 2025, arXiv:2505.18809, section 3. Per sample and head
    a bucket keeps its centre, and of the others those least similar to the centre by the cosine of their
    vectors; a token that is dropped is answered for by the centre.
Not copied from its code: there a grid must be whole buckets, and the index builder cuts what is over. Here
    tokens are packed as in `bricks`, the last bucket is short, and every token is in one bucket.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.block_heads import orders
from dit_accel.bricks import Grid, lay_bricks


@dataclass(frozen=True, eq=False)
class Buckets:
    """Where the visual tokens of each bucket stand in the sequence; the first of a bucket is its centre."""

    tokens: Tensor  # [NB, g] int64; a short bucket is filled with its centre
    held: Tensor  # [NB, g] bool: its own tokens, not filling
    back: Tensor  # [V] int64: for each token its place among the NB * g

    @property
    def whole(self) -> bool:
        """Whether no bucket is short."""
        return len(self.back) == self.tokens.numel()

    def inside(self, x: Tensor) -> Tensor:  # [B, V, h, D] -> [B, NB, g, h, D], float32 or wider
        """The vectors of each bucket."""
        found = x.index_select(1, self.tokens.flatten()).unflatten(1, self.tokens.shape)
        return found.to(torch.promote_types(x.dtype, torch.float32))

    def bias(self, bias: Tensor) -> Tensor:  # [B or 1, h or 1, V] -> [B or 1, h or 1, NB, g]
        """What is added to the scores of each token of a bucket; filling gets -inf."""
        return bias[:, :, self.tokens].masked_fill(~self.held, -torch.inf)


@dataclass(frozen=True, eq=False)
class Selection:
    """The n tokens that each bucket keeps, in every sample and head by themselves; R = NB * n rows in all."""

    buckets: Buckets
    kept: Tensor  # [B, h, NB, n] int64: places in the bucket, first 0, the centre; filling may follow

    def gather(self, x: Tensor) -> Tensor:  # [B, V, h, D] -> [B, R, h, D]
        """The vectors of the kept tokens."""
        tokens = self.buckets.tokens.expand(*self.kept.shape[:3], -1).gather(3, self.kept)
        return _rows_of(x, tokens.flatten(2))

    def copy_back(self, rows: Tensor) -> Tensor:  # [B, R, h, D] -> [B, V, h, D]
        """A row for every token: its own where it was kept, else that of its centre."""
        B, h, NB, n = self.kept.shape
        number = torch.arange(n, device=rows.device).expand_as(self.kept)
        of = self.kept.new_zeros(B, h, *self.buckets.tokens.shape).scatter(3, self.kept, number)
        of += n * torch.arange(NB, device=rows.device)[:, None]
        return _rows_of(rows, of.flatten(2)[:, :, self.buckets.back])

    def kept_bias(self, bias: Tensor) -> Tensor:  # [B or 1, h or 1, NB, g] -> [B, h, R]
        """What is added to the scores of the kept tokens."""
        return bias.expand(*self.kept.shape[:3], -1).gather(3, self.kept).flatten(2)

    def stand_ins(self, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Values [B, R, h, D] and biases [B, h, R] with which a centre also does what its dropped tokens did.

        v is [B, V, h, D], bias [B or 1, h or 1, NB, g]. Tokens j with the key of their centre and biases b_j
        act as one with the bias log sum_j exp(b_j), log of their number where all b_j = 0, and with the mean
        of their values by the weights exp(b_j).
        """
        B, h, NB, n = self.kept.shape
        biases = bias.expand(B, h, NB, -1)
        others = biases.scatter(3, self.kept[..., 1:], -torch.inf)  # the centre and what is dropped
        total = others.logsumexp(3)
        share = (others - total.clamp(min=torch.finfo(total.dtype).min)[..., None]).exp()
        inside = self.buckets.inside(v)
        mean = torch.einsum("bhng,bnghd->bnhd", share.to(inside.dtype), inside)
        values = self.gather(v).unflatten(1, (NB, n))
        values[:, :, 0] = mean.to(v.dtype)
        weight = self.kept_bias(bias).unflatten(2, (NB, n))
        weight[..., 0] = total
        return values.flatten(1, 2), weight.flatten(2)


def select(x: Tensor, buckets: Buckets, kept: int) -> Selection:
    """Of each bucket of x [B, V, h, D] keep the centre and those least similar to it, `kept` in all."""
    inside = buckets.inside(x)
    # the cosine times the length of the centre, which orders a bucket alike: F.cosine_similarity takes that
    # length anew for every token, and twice the time of all this
    length = torch.linalg.vector_norm(inside, dim=-1).clamp(min=torch.finfo(inside.dtype).tiny)
    likeness = ((inside * inside[:, :, :1]).sum(-1) / length).permute(0, 3, 1, 2)  # [B, h, NB, g]
    likeness = likeness.masked_fill(~buckets.held, torch.inf)  # filling is dropped first
    likeness[..., 0] = -torch.inf  # the centre is always kept, and first
    # stable: of equal tokens the same are kept in whatever order the sequence stands
    return Selection(buckets, likeness.argsort(dim=3, stable=True)[..., :kept])


@functools.lru_cache(maxsize=16)
def lay_buckets(grid: Grid, bucket: Grid, device: torch.device, brick: Grid | None = None) -> Buckets:
    """The buckets of a grid whose tokens stand in raster order, or in the order of `brick`.

    The centre of (frames, rows, columns) tokens is (frames // 2, rows // 2, columns // 2), and the last token
    of a short bucket that does not reach so far.
    """
    with torch.inference_mode(False):  # kept for later calls, which may be outside of inference mode
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
        if brick is not None:
            tokens = orders(grid, brick, 0, False, device)[1][tokens]
        back = tokens.new_empty(math.prod(grid))
        back[tokens[held]] = held.flatten().nonzero()[:, 0]
        return Buckets(tokens, held, back)


def _rows_of(x: Tensor, index: Tensor) -> Tensor:  # [B, N, h, D], [B, h, R] -> [B, R, h, D]
    B, N, h, D = x.shape
    sample, head = (torch.arange(n, device=x.device) for n in (B, h))
    # whole rows by one index each: gather over D copies single numbers, 20 times slower on a CPU
    row = (index.transpose(1, 2) + N * sample[:, None, None]) * h + head
    return x.reshape(B * N * h, D).index_select(0, row.flatten()).view(B, -1, h, D)
