"""Coreset attention from the words of the paper (VORTA, arXiv:2505.18809, section 3), one bucket at a time.

Loops over samples, heads, buckets and tokens, in the dtype of what it is given; nothing of the library.
"""

import torch
from torch import Tensor

Grid = tuple[int, int, int]
INFINITY = float("inf")


def coreset_attention(
    q: Tensor, k: Tensor, v: Tensor,  # [B, N, h, D]
    grid: Grid, bucket: Grid, kept: int, queries: str, keys: str, reweight: bool,
    bias: Tensor | None = None,  # [B or 1, h or 1, N], added to the scores
    scale: float | None = None, num_text: int = 0, text_first: bool = True,
) -> Tensor:  # fmt: skip
    """The output [B, N, h, D]."""
    offset = num_text if text_first else 0
    buckets = [[token + offset for token in one] for one in tokens_of_buckets(grid, bucket)]
    visual = [token for one in buckets for token in one]
    text = [token for token in range(q.shape[1]) if token not in set(visual)]
    bias = torch.zeros(1, 1, 1).expand(1, 1, q.shape[1]) if bias is None else bias
    bias = bias.expand(q.shape[0], q.shape[2], -1).to(q.dtype)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out = torch.full_like(q, float("nan"))
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            rows = [x[sample, :, head] for x in (q, k, v)]
            of_head = (*rows, bias[sample, head], buckets, bucket, kept, queries, keys, reweight, scale, text)
            out[sample, :, head] = one_head(*of_head)
    return out


def one_head(q, k, v, bias, buckets, bucket, kept, queries, keys, reweight, scale, text) -> Tensor:
    """One head of one sample: q, k, v [N, D] -> [N, D]."""
    out = torch.full_like(q, float("nan"))
    everything = list(range(len(q)))
    out[text] = attend(q[text], k, v, bias, scale)
    of_queries = [split(q, one, bucket, kept) for one in buckets]
    of_keys = {"selected": [split(k, one, bucket, kept) for one in buckets], "as_queries": of_queries}
    if keys == "all":
        seen = k, v, bias
    else:
        parts = [stand_in(k, v, bias, *each, reweight) for each in of_keys[keys]]
        parts.append((k[text], v[text], bias[text]))
        seen = tuple(torch.cat(each) for each in zip(*parts, strict=True))
    if queries == "all":
        visual = [token for token in everything if token not in text]
        out[visual] = attend(q[visual], *seen, scale)
        return out
    for staying, dropped in of_queries:
        out[staying] = attend(q[staying], *seen, scale)
        for token in dropped:
            out[token] = out[staying[0]]
    return out


def split(x: Tensor, tokens: list[int], bucket: Grid, kept: int) -> tuple[list[int], list[int]]:
    """The tokens of a bucket that are kept, its centre first, and those that are dropped."""
    frames, rows, columns = bucket
    middle = frames // 2 * rows * columns + rows // 2 * columns + columns // 2
    centre = tokens[min(middle, len(tokens) - 1)]
    c = x[centre]
    others = [token for token in tokens if token != centre]
    others.sort(key=lambda token: float(x[token] @ c / (x[token].norm() * c.norm())))
    return [centre, *others[: kept - 1]], others[kept - 1 :]


def stand_in(k, v, bias, staying, dropped, reweight) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and biases of what is kept of a bucket."""
    values, biases = v[staying].clone(), bias[staying].clone()
    if reweight:
        group = [staying[0], *dropped]
        votes = bias[group].exp()
        biases[0] = votes.sum().log()
        if votes.sum() > 0:
            values[0] = (votes[:, None] * v[group]).sum(0) / votes.sum()
    return k[staying], values, biases


def attend(q, k, v, bias, scale) -> Tensor:
    """Dense attention [N, D]; rows that see nothing are 0."""
    scores = q @ k.T * scale + bias
    return (scores.softmax(1) if (bias > -INFINITY).any() else torch.zeros_like(scores)) @ v


def tokens_of_buckets(grid: Grid, bucket: Grid) -> list[list[int]]:
    """Raster numbers by bucket: boxes clipped at the edges of the grid, walked to and fro, and packed."""
    counts = [-(-n // size) for n, size in zip(grid, bucket, strict=True)]
    boxes: dict[tuple[int, int, int], list[int]] = {}
    for number, place in enumerate(
        (f, y, x) for f in range(grid[0]) for y in range(grid[1]) for x in range(grid[2])
    ):
        frame, row, column = (at // size for at, size in zip(place, bucket, strict=True))
        row = row if frame % 2 == 0 else counts[1] - 1 - row
        column = column if (frame * counts[1] + row) % 2 == 0 else counts[2] - 1 - column
        boxes.setdefault((frame, row, column), []).append(number)
    packed = [token for box in sorted(boxes) for token in boxes[box]]
    size = bucket[0] * bucket[1] * bucket[2]
    return [packed[at : at + size] for at in range(0, len(packed), size)]
