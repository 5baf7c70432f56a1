"""Which blocks of keys each head and block of queries attends, and what becomes of the result.

A plan is built once for a (grid, text length, device) and is immutable: int32 tensors that every backend
reads, and the few numbers a host needs, so that no call waits for a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Kind(IntEnum):
    """What one head does; `near` and `rest` are the two block lists of its pattern."""

    ATTEND = 0  # out = attention over near
    COPY = 1  # out = cached
    SKIP = 2  # out stays as the caller gave it
    ADD = 3  # out = attention over near + cached, a residual
    MERGE = 4  # out = attention over near, merged with cached and cached_lse, a tail
    EMIT_RESIDUAL = 5  # out = attention over near and rest; cached = out - attention over near
    EMIT_TAIL = 6  # out = attention over near and rest; cached, cached_lse = attention over rest


CACHED = frozenset(Kind) - {Kind.ATTEND, Kind.SKIP}
CACHED_LSE = frozenset({Kind.MERGE, Kind.EMIT_TAIL})
EMITS = frozenset({Kind.EMIT_RESIDUAL, Kind.EMIT_TAIL})
WITHOUT_LIST = frozenset({Kind.COPY, Kind.SKIP})


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Block lists in CSR form, one per pattern; heads share patterns.

    Row r = pattern[h] * NQ + i holds for query block i the key blocks `indices[pointers[r]:pointers[r + 1]]`:
    up to `split[r]` its near list, from there its rest. Block i of the queries is the tokens
    `q_starts[i]:q_starts[i + 1]`, at most `block` of them, so a ragged block may stand anywhere.
    """

    block: int
    q_starts: Tensor  # [NQ + 1]
    k_starts: Tensor  # [NK + 1]
    pattern: Tensor  # [H]
    kind: Tensor  # [H]
    slot: Tensor  # [H]: the head's place in `cached`, -1 for heads that have none
    pointers: Tensor  # [P * NQ + 1]
    split: Tensor  # [P * NQ]
    indices: Tensor
    work: Tensor  # [W, 2]: (head, query block), longest first; heads of kind SKIP have none
    kinds: tuple[Kind, ...]  # `kind` on the host
    pairs: int  # block pairs attended per sample, near and rest, all heads
    tokens: tuple[int, int]  # of the queries and of the keys

    @property
    def num_heads(self) -> int:
        """H."""
        return len(self.kinds)

    @property
    def num_cached(self) -> int:
        """How many heads have a slot in `cached`."""
        return sum(kind in CACHED for kind in self.kinds)

    @property
    def density(self) -> float:
        """Block pairs attended, over those of dense attention in all heads."""
        return self.pairs / max(1, self.num_heads * (len(self.q_starts) - 1) * (len(self.k_starts) - 1))

    def tensors(self) -> list[Tensor]:
        """All tensors in the order of the fields: what an operator that takes no objects is given."""
        return [getattr(self, name) for name in TENSORS]

    def for_heads(self, kinds: Sequence[Kind | int], pattern: Sequence[int]) -> BlockPlan:
        """A plan of other heads over the same lists, which it shares.

        Raises ValueError unless there is a pattern for every head. Waits for the device once.
        """
        kinds, device = tuple(Kind(kind) for kind in kinds), self.indices.device
        pointers, split = self.pointers.cpu(), self.split.cpu()
        near = (split - pointers[:-1]).view(-1, len(self.q_starts) - 1)  # [P, NQ]: lengths of the lists
        rest = (pointers[1:] - split).view_as(near)
        _check_heads(kinds, pattern, len(near))
        heads = _heads(near, rest, kinds, pattern)
        return dataclasses.replace(
            self, **{name: x.to(device) if isinstance(x, Tensor) else x for name, x in heads.items()}
        )

    def to(self, device: torch.device | str) -> BlockPlan:
        """The plan on another device."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return BlockPlan(self.block, kinds=self.kinds, pairs=self.pairs, tokens=self.tokens, **moved)


TENSORS = ("q_starts", "k_starts", "pattern", "kind", "slot", "pointers", "split", "indices", "work")


def starts_of(tokens: int, block: int = 128) -> Tensor:
    """Starts of blocks of `block` tokens, the last one ragged: int32 [ceil(tokens / block) + 1]."""
    return torch.tensor([*range(0, tokens, block), tokens], dtype=torch.int32)


def plan_blocks(
    near: Sequence[Tensor] | Tensor,  # P bool tensors [NQ, NK]: the patterns
    q_starts: Tensor,  # int [NQ + 1]
    k_starts: Tensor,  # int [NK + 1]
    kinds: Sequence[Kind | int],  # H
    pattern: Sequence[int] | None = None,  # H numbers of patterns; head h has pattern h when None
    rest: Sequence[Tensor] | Tensor | None = None,  # P bool tensors [NQ, NK]; all that is not near when None
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockPlan:
    """The plan of H heads. Raises ValueError for starts, patterns or lists that do not fit together."""
    near = torch.stack([n.cpu() for n in near]).bool()
    rest = ~near if rest is None else torch.stack([r.cpu() for r in rest]).bool()
    kinds = tuple(Kind(kind) for kind in kinds)
    pattern = range(len(kinds)) if pattern is None else pattern
    q_starts, k_starts = q_starts.cpu().int(), k_starts.cpu().int()
    _check(near, rest, q_starts, k_starts, kinds, pattern, block)
    pointers, split, indices = _lists(near, rest)
    return BlockPlan(
        block,
        q_starts,
        k_starts,
        pointers=pointers,
        split=split,
        indices=indices,
        tokens=(int(q_starts[-1]), int(k_starts[-1])),
        **_heads(near.sum(2), rest.sum(2), kinds, pattern),
    ).to(device)


def _int32(values: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def _check(near, rest, q_starts, k_starts, kinds, pattern, block) -> None:
    blocks = len(q_starts) - 1, len(k_starts) - 1
    for name, starts in (("q_starts", q_starts), ("k_starts", k_starts)):
        sizes = starts.diff()
        if len(starts) < 2 or starts[0] != 0 or sizes.min() < 1 or sizes.max() > block:
            raise ValueError(
                f"block_attention: {name} must rise from 0 in steps of 1 to {block} tokens; "
                f"got {starts.tolist()}"
            )
    if near.shape[1:] != blocks or rest.shape != near.shape:
        raise ValueError(
            f"block_attention: every list must be [NQ, NK] = {list(blocks)}; got near {list(near.shape)}, "
            f"rest {list(rest.shape)}"
        )
    if (near & rest).any():
        raise ValueError("block_attention: a key block stands in the near and in the rest list of a row")
    _check_heads(kinds, pattern, len(near))


def _check_heads(kinds: Sequence[Kind], pattern: Sequence[int], patterns: int) -> None:
    if len(pattern) != len(kinds) or any(not 0 <= p < patterns for p in pattern):
        raise ValueError(
            f"block_attention: {len(kinds)} heads need {len(kinds)} pattern numbers below {patterns}; "
            f"got {list(pattern)}"
        )


def _lists(near: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR over rows (pattern, query block): near blocks in order, then the rest in order."""
    near_rows, rest_rows = near.flatten(0, 1), rest.flatten(0, 1)  # [P * NQ, NK]
    lengths = near_rows.sum(1) + rest_rows.sum(1)
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = [
        torch.cat([n.nonzero()[:, 0], r.nonzero()[:, 0]]) for n, r in zip(near_rows, rest_rows, strict=True)
    ]
    return _int32(pointers), _int32(pointers[:-1] + near_rows.sum(1)), _int32(torch.cat(indices))


def _heads(near: Tensor, rest: Tensor, kinds: tuple[Kind, ...], pattern: Sequence[int]) -> dict[str, Any]:
    """The fields of a plan that depend on its heads, from the lengths [P, NQ] of its lists."""
    slots, used = [], 0
    for kind in kinds:
        slots.append(used if kind in CACHED else -1)
        used += kind in CACHED
    work, pairs = _work(near, rest, kinds, pattern)
    numbers = {"pattern": _int32(list(pattern)), "kind": _int32(kinds), "slot": _int32(slots)}
    return {**numbers, "work": work, "kinds": kinds, "pairs": pairs}


def _work(near: Tensor, rest: Tensor, kinds: Sequence[Kind], pattern: Sequence[int]) -> tuple[Tensor, int]:
    """Items (head, query block), longest first; and how many block pairs they attend."""
    of, rows = torch.tensor(list(pattern), dtype=torch.int64), near.shape[1]
    near_too, rest_too, any_item = (
        torch.tensor([test(kind) for kind in kinds], dtype=torch.bool)[:, None]
        for test in (lambda k: k not in WITHOUT_LIST, lambda k: k in EMITS, lambda k: k is not Kind.SKIP)
    )
    lengths = near[of].long() * near_too + rest[of].long() * rest_too  # [H, NQ]
    lengths, places = lengths.flatten().sort(
        descending=True, stable=True
    )  # of one length, heads stay together
    places = places[any_item.expand(-1, rows).flatten()[places]]
    return _int32(torch.stack([places // rows, places % rows], dim=1)), int(lengths.sum())
