"""A stand-in for the driver that runs launches of `cuda.cu` in numpy, from the addresses that it is given.

It walks the ticket, the lists and the tiles as the kernel does, one persistent block after another in random
order, with boxes as TMA brings them, base-2 online softmax, and weights rounded to 16 bits. Both 64-query
consumers go as one: rows do not meet. It has no layouts (`test_hopper_model.py` has), no races and no time.
"""

import ctypes as c
from dataclasses import dataclass

import numpy as np
import torch

from dit_accel_kernels.block_attention.cuda_launch import Arguments
from dit_accel_kernels.block_attention.plan import Kind
from dit_accel_kernels.cuda_driver import BFLOAT16

LOG2_E, ROWS, INFINITY = np.float32(1.4426950408889634), 128, np.float32(np.inf)
EMITS = (Kind.EMIT_RESIDUAL, Kind.EMIT_TAIL)


def read(address: int, count: int, kind: type) -> np.ndarray:
    """A view of `count` numbers in memory."""
    return np.frombuffer((c.c_char * (count * np.dtype(kind).itemsize)).from_address(address), kind)


@dataclass
class Memory:
    """Rows of 16-bit numbers at addresses."""

    brain: bool

    def rows(self, address: int, count: int, step: int, width: int) -> np.ndarray:
        """float32 [count, width] of rows that lie `step` bytes apart."""
        bits = read(address, (count - 1) * step // 2 + width, np.uint16)
        bits = np.lib.stride_tricks.as_strided(bits, (count, width), (step, 2))
        if self.brain:
            return (bits.astype(np.uint32) << 16).view(np.float32)
        return bits.copy().view(np.float16).astype(np.float32)

    def rounded(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(torch.bfloat16 if self.brain else torch.float16)

    def write(self, address: int, values: np.ndarray) -> None:
        bits = self.rounded(values).view(torch.int16).numpy()
        read(address, len(values), np.uint16)[:] = bits.view(np.uint16)


class Machine:
    """What `cuda.driver()` returns in tests."""

    def __init__(self, seed: int = 0):
        self.random = np.random.default_rng(seed)
        self.launches: list[dict] = []

    def use_device(self, ordinal: int) -> None:
        pass

    def load_function(self, cubin: bytes, name: str, shared_bytes: int) -> tuple:
        return name, shared_bytes

    def tensor_map(self, *spec) -> tuple:
        return spec

    def launch(self, function, grid, block, shared_bytes, stream, arguments) -> None:
        self.launches.append({"grid": grid, "block": block, "shared": shared_bytes, "stream": stream})
        *maps, given = arguments
        run = Run(maps, given)
        tickets = list(range(grid))  # what each persistent block holds
        while tickets:
            ticket = tickets.pop(self.random.integers(len(tickets)))
            if ticket < given.batch * given.items:
                run.item(ticket)
                counter = read(given.ticket, 1, np.int32)
                tickets.append(grid + int(counter[0]))
                counter[0] += 1


class Run:
    """One launch."""

    def __init__(self, maps: list[tuple], given: Arguments):
        self.q, self.k, self.v = maps
        self.a, self.memory = given, Memory(maps[0][0] == BFLOAT16)
        self.width = maps[0][2][0]

    def number(self, name: str, place: int) -> int:
        return int(read(getattr(self.a, name) + 4 * place, 1, np.int32)[0])

    def box(self, spec: tuple, token: int, head: int, batch: int) -> np.ndarray:
        """[128, D] as TMA brings it: zeros beyond the tensor."""
        _, address, (width, tokens, heads, samples), (step, of_head, of_batch), box = spec
        assert box == (64, ROWS, 1, 1) and head < heads and batch < samples
        found = np.zeros((ROWS, width), np.float32)
        inside = min(ROWS, tokens - token)
        start = address + batch * of_batch + head * of_head + token * step
        found[:inside] = self.memory.rows(start, inside, step, width)
        return found

    def item(self, ticket: int) -> None:
        """Item.read, and what produce and consume make of it."""
        row, batch = divmod(ticket, self.a.batch)
        head, block = self.number("work", 2 * row), self.number("work", 2 * row + 1)
        kind, listed = Kind(self.number("kind", head)), self.number("pattern", head) * self.a.q_blocks + block
        first, middle = self.number("pointers", listed), self.number("split", listed)
        middle = first if kind is Kind.COPY else middle
        end = self.number("pointers", listed + 1) if kind in EMITS else middle
        q = self.box(self.q, self.number("q_starts", block), head, batch) if first < end else None
        parts = [self.attend(q, range(first, middle), head, batch)]
        if kind in EMITS:
            parts.append(self.attend(q, range(middle, end), head, batch))
        self.finish(batch, head, block, kind, parts)

    def attend(self, q, places: range, head: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Normalised output [128, D] and natural-log LSE [128] over some key blocks."""
        o, total = np.zeros((ROWS, self.width), np.float32), np.zeros(ROWS, np.float32)
        top = np.full(ROWS, -INFINITY, np.float32)
        sample = 0 if self.a.kv_batch == 1 else batch
        for place in places:
            block = self.number("indices", place)
            start, stop = self.number("k_starts", block), self.number("k_starts", block + 1)
            if self.a.valid_keys:
                stop = min(stop, self.number("valid_keys", batch))
            bias = self.bias(start, max(stop - start, 0), head, batch)
            k, v = self.box(self.k, start, head, sample), self.box(self.v, start, head, sample)
            scores = q @ k.T * (np.float32(self.a.scale) * LOG2_E) + bias
            scores = np.fmin(scores, np.where(bias == -INFINITY, -INFINITY, INFINITY))
            best = np.fmax(top, np.fmax.reduce(scores, axis=1))
            shift = np.where(best == -INFINITY, np.float32(0), best)
            weights, decay = np.exp2(scores - shift[:, None]), np.exp2(top - shift)
            top, total = best, total * decay + weights.sum(1)
            o = o * decay[:, None]
            o += self.memory.rounded(weights).float().numpy() @ np.where((bias == -INFINITY)[:, None], 0, v)
        empty = total == 0
        total = np.where(empty, np.float32(1), total)
        lse = np.where(empty, -INFINITY, (top + np.log2(total)) / LOG2_E)
        return o / total[:, None], lse

    def bias(self, start: int, seen: int, head: int, batch: int) -> np.ndarray:
        """prepare_bias: what is added to the scores of 128 keys, base 2."""
        found = np.full(ROWS, -INFINITY, np.float32)
        found[:seen] = 0
        if self.a.key_bias and seen:
            of_batch, of_head, step = self.a.bias_stride
            at = self.a.key_bias + 4 * (batch * of_batch + head * of_head + start * step)
            found[:seen] = LOG2_E * read(at, (seen - 1) * step + 1, np.float32)[:: max(step, 1)]
        return found

    def at(self, name: str, batch: int, token: int, head: int, size: int) -> int:
        """The address of a row of `out`, `lse`, `cached` or `cached_lse`."""
        steps = getattr(self.a, f"{name}_stride")
        places = zip((batch, token, head), steps, strict=True)
        return getattr(self.a, name) + size * sum(n * step for n, step in places)

    def finish(self, batch: int, head: int, block: int, kind: Kind, parts: list) -> None:
        """Consumer.finish: what each kind writes, row by row."""
        start, stop = self.number("q_starts", block), self.number("q_starts", block + 1)
        slot = self.number("slot", head)
        for row, token in enumerate(range(start, stop)):
            (o, lse), *rest = [(o[row], lse[row]) for o, lse in parts]
            result = o
            if slot >= 0:
                cached = self.at("cached", batch, token, slot, 2)
                if kind in (Kind.COPY, Kind.ADD, Kind.MERGE):
                    kept = self.memory.rows(cached, 1, 0, self.width)[0]
                    result = kept if kind is Kind.COPY else o + kept
            if kind in (Kind.MERGE, Kind.EMIT_TAIL):
                kept_lse = read(self.at("cached_lse", batch, token, slot, 4), 1, np.float32)
            if kind is Kind.MERGE:
                result, lse = merged(o, lse, kept, kept_lse[0])
            if kind in EMITS:
                near, (o, rest_lse) = o, rest[0]
                result, lse = merged(near, lse, o, rest_lse)
                self.memory.write(cached, o if kind is Kind.EMIT_TAIL else result - near)
            if kind is Kind.EMIT_TAIL:
                kept_lse[0] = rest_lse
            self.memory.write(self.at("out", batch, token, head, 2), result)
            read(self.at("lse", batch, token, head, 4), 1, np.float32)[0] = lse


def merged(a: np.ndarray, lse_a: float, b: np.ndarray, lse_b: float) -> tuple[np.ndarray, np.float32]:
    """merge_weights of cuda.cu, applied."""
    top = max(lse_a, lse_b)
    if top == -INFINITY:
        return np.zeros_like(a), -INFINITY
    weight_a, weight_b = np.exp(lse_a - top), np.exp(lse_b - top)
    total = weight_a + weight_b
    out = a * (weight_a / total) + b * (weight_b / total)
    return out.astype(np.float32), np.float32(top + np.log(total))
