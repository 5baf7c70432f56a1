"""One attention call of one site: which heads do what, what they may read, what is kept of the result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel import block_heads
from dit_accel.block_heads import Part, Tokens
from dit_accel.bricks import Grid
from dit_accel.errors import MissingAnchor, Slower, Unmet
from dit_accel.plan import Key
from dit_accel.run_report import method_name
from dit_accel.session import Session
from dit_accel.timeline import ALONE, DIFFERENCE, OUT, SHARED, TAIL_LSE, Entry, Track

Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class AttentionVisit:
    """What a method sees: its own heads of q, k, v on one branch, after norm and RoPE."""

    q: Tensor  # [B, N, h, D]
    k: Tensor  # [B, M, h, D]
    v: Tensor  # [B, M, h, D]
    mask: Tensor | None  # broadcastable to [B, h, N, M]; bool (True is seen) or additive
    scale: float | None  # softmax scale, None is 1 / sqrt(D)
    heads: tuple[int, ...]  # positions in the whole model, also where heads are sharded
    call: "_Call"

    def dense(self) -> Tensor:
        """The model's own attention on these heads."""
        return self.call.dense(self.q, self.k, self.v, self.mask)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Visual tokens: frames, rows, columns. Raises Unmet where the sequence is not grid plus text."""
        return self.call.checked_grid()

    @property
    def num_text(self) -> int:
        """Text tokens in the sequence."""
        return self.call.num_text

    @property
    def text_first(self) -> bool:
        """Whether text stands before the visual tokens."""
        return self.call.text_first

    @property
    def again(self) -> bool:
        """Whether the processor has attended at this step before (image keys of Wan I2V)."""
        return self.call.call_number > 0

    @property
    def brick(self) -> Grid | None:
        """The brick in whose order the visual tokens stand; None: they stand in the model's own order."""
        return self.call.brick

    @property
    def step(self) -> int:
        """The step of the schedule that runs."""
        return self.call.at.step

    @property
    def text_rows(self) -> slice:
        """Where text stands in the sequence."""
        return self.call.text_rows(self.q.shape[1])

    @property
    def visual_rows(self) -> slice:
        """Where the visual tokens stand in the sequence."""
        return self.call.visual_rows(self.q.shape[1])

    def of(self, heads: Sequence[int]) -> "AttentionVisit":
        """Some heads of the whole call."""
        return self.call.visit(heads)

    def key_bias(self) -> Tensor | None:
        """The mask as float32 [B or 1, h or 1, M], added to scores; Unmet where queries differ."""
        return block_heads.key_bias(self.mask, self.k.shape[1])

    def tokens(self) -> Tokens:
        """What an op over blocks needs of this visit."""
        return Tokens(
            self.q, self.k, self.v, self.key_bias(), self.scale,
            self.grid, self.num_text, self.text_first, self.brick,
        )  # fmt: skip

    def attend_blocks(self, part: Part) -> Tensor:
        """All heads of this visit do the same over blocks: [B, N, h, D]."""
        out = self.q.new_empty(self.q.shape)
        block_heads.attend(self.tokens(), [(range(len(self.heads)), part)], out)
        return out

    def recall(self, name: str, max_age: int) -> Tensor:
        """These heads of a stored value of this branch; MissingAnchor if it is not there or too old."""
        return self.call.recall(name, self.call.branch, self.heads, max_age)

    def recall_from_cond(self, name: str) -> Tensor:
        """These heads of what cond stored at this very step."""
        return self.call.recall(name, "cond", self.heads, max_age=0)

    def keep(self, name: str, value: Tensor) -> None:  # [B, N, h, C]
        """Store a value of these heads for later steps of this branch, as an entry's `keep` says."""
        self.call.store(name, value, self.heads)

    def note(self, text: str) -> None:
        """A sentence for the report, once for this site."""
        self.call.session.note_once(text, self.call.key[1])

    def with_exact_text(self, visual: Tensor) -> Tensor:  # visual [B, N - num_text, h, D] -> [B, N, h, D]
        """Join shared visual rows with text rows computed by the model's own attention."""
        if self.num_text == 0:
            return visual
        rows = self.call.text_rows(self.q.shape[1])
        mask = self.mask
        if mask is not None and mask.shape[-2] not in (1,):
            mask = mask[..., rows, :]
        text = self.call.dense(self.q[:, rows], self.k, self.v, mask)
        return torch.cat([text, visual] if self.text_first else [visual, text], dim=1)


def attend(
    session: Session, key: Key, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
    dense: Dense, first_head: int = 0,
) -> Tensor:  # fmt: skip
    """The attention call of site `key`: q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D].

    `first_head` is the position of head 0 in the model where a process holds only a shard of the heads.
    """
    track = session.track("attention", key)
    at = session.at
    if track is None or at is None:
        return dense(q, k, v, mask)
    if at.branch != "both" or track.together:
        return _Call(session, key, at.branch, track, q, k, v, mask, scale, dense, first_head).run()
    uncond, cond = (_half(x, at.batch, i) for i in (0, 1) for x in [(q, k, v, mask)])
    # cond first: uncond may read what it stores
    out_cond = _Call(
        session, key, "cond", track, *cond, scale=scale, dense=dense, first_head=first_head
    ).run()
    out_uncond = _Call(
        session, key, "uncond", track, *uncond, scale=scale, dense=dense, first_head=first_head
    ).run()
    return torch.cat([out_uncond, out_cond])


def _half(tensors: Sequence[Tensor | None], batch: int, index: int) -> list[Any]:
    """The uncond (0) or cond (1) half of a batched pair; what has no such batch axis is kept whole."""
    return [x if x is None or x.shape[0] != batch else x.chunk(2)[index] for x in tensors]


@dataclass
class _Books:
    """What one call has done so far."""

    letters: list[str]
    done: dict[Any, int] = field(default_factory=dict)  # method -> heads that it served
    fell_back: list[int] = field(default_factory=list)

    def served(self, method: Any, heads: Sequence[int]) -> None:
        self.done[method] = self.done.get(method, 0) + len(heads)


class _Call:
    """The attention call of one site on one branch."""

    def __init__(
        self, session: Session, key: Key, branch: str, track: Track, q: Tensor, k: Tensor, v: Tensor,
        mask: Tensor | None, scale: float | None, dense: Dense, first_head: int,
    ):  # fmt: skip
        assert session.at is not None
        self.session, self.key, self.branch, self.track = session, key, branch, track
        self.q, self.k, self.v, self.mask, self.scale, self.dense = q, k, v, mask, scale, dense
        self.first_head, self.at = first_head, session.at
        self.entry: Entry = track.entry(self.at.step, branch)
        self.call_number = self._number_call()
        self.is_self = key[1] in session.denoisers[key[0]].self_attention
        self.num_text = k.shape[1] - self.at.visual if self.is_self and self.at.joint else 0
        self.text_first = self.at.text_first
        self.brick = self.at.brick if self.is_self else None

    def _number_call(self) -> int:
        """A processor may attend more than once (image and text keys of Wan I2V): number its calls."""
        counter = ("calls", self.key, self.branch)
        self.session.scratch[counter] = number = self.session.scratch.get(counter, -1) + 1
        return number

    def run(self) -> Tensor:
        """All heads, each by its own method; then what a later step needs is stored."""
        local = range(self.first_head, self.first_head + self.q.shape[2])
        groups = [(method, [h for h in heads if h in local]) for method, heads in self.entry.groups]
        groups = [(method, heads) for method, heads in groups if heads]
        books = _Books(list(self.entry.letters))
        out = self._serve(*groups[0], books) if len(groups) == 1 else self._serve_all(groups, books)
        self._keep(out, books.fell_back)
        if self.call_number == 0:
            self.session.count(self.key, self.branch, "".join(books.letters), books.done)
            if self.is_self:
                self.session.work.attend(self.key, self.branch, books.done, (self.at.grid, self.num_text))
        return out

    def _serve_all(self, groups: Sequence[tuple[Any, list[int]]], books: "_Books") -> Tensor:
        """Groups that attend over blocks go in one call of the op, every other by itself."""
        out = self.q.new_empty((*self.q.shape[:3], self.v.shape[3]))
        parts: list[tuple[list[int], Part]] = []
        for method, heads in groups:
            local = [h - self.first_head for h in heads]
            part = None
            if hasattr(method, "part"):
                try:
                    part = method.part(self.visit(heads))
                except (MissingAnchor, Slower, Unmet) as reason:
                    self._fall_back(method, heads, reason, books)
                    method = None
            if part is None:
                out[:, :, block_heads.run_of(local)] = self._serve(method, heads, books)
            else:
                parts.append((local, part))
                books.served(method, heads)
        if parts:
            everything = range(self.first_head, self.first_head + self.q.shape[2])
            block_heads.attend(self.visit(everything).tokens(), parts, out)
        return out

    def _serve(self, method: Any, heads: list[int], books: "_Books") -> Tensor:
        visit = self.visit(heads)
        if method is not None:
            try:
                out = method.attend(visit)
                books.served(method, heads)
                return out
            except (MissingAnchor, Slower, Unmet) as reason:
                self._fall_back(method, heads, reason, books)
        books.served(None, heads)
        return visit.dense()

    def _fall_back(self, method: Any, heads: list[int], reason: Exception, books: "_Books") -> None:
        for head in heads:
            books.letters[head] = ALONE
        if isinstance(reason, Slower):  # exact and faster is no failure: strict does not mind
            self.session.note_once(f"{method_name(method)} runs dense: {reason}", self.key[1])
            return
        self.session.fallback(f"ran dense where {method_name(method)} was planned: {reason}", self.key[1])
        books.fell_back.extend(heads)

    def visit(self, heads: Sequence[int]) -> AttentionVisit:
        """Some heads of this call, as a method sees them."""
        q, k, v, mask = self.q, self.k, self.v, self.mask
        if len(heads) < q.shape[2]:
            local = block_heads.run_of([h - self.first_head for h in heads])
            if mask is not None and mask.ndim == 4 and mask.shape[1] == q.shape[2] > 1:
                mask = mask[:, local]
            q, k, v = q[:, :, local], k[:, :, local], v[:, :, local]
        return AttentionVisit(q, k, v, mask, self.scale, tuple(heads), self)

    # ---- memory

    def _address(self, branch: str) -> Any:
        component, site, branch, layout = self.session.address(self.key, branch)
        return component, site, branch, (*layout, self.call_number)

    def _keep(self, out: Tensor, fell_back: list[int]) -> None:
        """Store what later steps read; heads that had to compute store all that is ever read of them."""
        branch = "cond" if self.branch == "both" else self.branch
        for owner, name in self.track.slots:
            if owner != branch or name not in (OUT, SHARED, DIFFERENCE):  # what an anchor stores is stored
                continue
            of = self._stored_heads(owner, name)
            heads = [h for h in of if h in self.entry.keep.get(name, ()) or h in fell_back]
            value = self._value(name, out, heads)
            if heads and value is not None:
                shifted = [h - self.first_head for h in heads], [h - self.first_head for h in of]
                self.session.memory.store_heads(
                    self._address(self.branch), name, value, *shifted, self.at.step
                )

    def _stored_heads(self, owner: str, name: str) -> list[int]:
        """The heads that are ever stored under a name, of those that this process holds."""
        local = range(self.first_head, self.first_head + self.q.shape[2])
        return [h for h in self.track.slots[owner, name] if h in local]

    def store(self, name: str, value: Tensor, heads: Sequence[int]) -> None:
        """Store a value [B, N, h, C] of `heads` that a method made itself."""
        of = self._stored_heads("cond" if self.branch == "both" else self.branch, name)
        self.session.memory.store_heads(
            self._address(self.branch), name, value,
            [h - self.first_head for h in heads], [h - self.first_head for h in of],
            self.at.step, places=range(len(heads)),
        )  # fmt: skip

    def _value(self, name: str, out: Tensor, heads: list[int]) -> Tensor | None:
        if name == OUT or not heads:
            return out
        visual = out[:, self.visual_rows(out.shape[1])]
        if name == SHARED:
            return visual
        assert name == DIFFERENCE
        try:
            shared = self.recall(SHARED, "cond", heads, max_age=0)
        except MissingAnchor:
            return None  # cond was not computed at this step
        difference = torch.zeros_like(visual)
        local = [h - self.first_head for h in heads]
        difference[:, :, local] = visual[:, :, local] - shared
        return difference

    def recall(self, name: str, branch: str, heads: Sequence[int], max_age: int) -> Tensor:
        """Heads of a stored value; raises MissingAnchor if missing, of another shape, or over-age."""
        slot = self.session.memory.recall(self._address(branch), name)
        local = [h - self.first_head for h in heads]
        ages = [self.at.step - slot.made_at[h] if slot and h in slot.made_at else None for h in local]
        if slot is None or any(age is None or age > max_age or age < 0 for age in ages):
            raise MissingAnchor(f"no {name} of the {branch} branch at most {max_age} steps old (ages {ages})")
        value = slot.tensors[0]
        rows = self.q.shape[1] - (self.num_text if name in (SHARED, DIFFERENCE) else 0)
        width = 1 if name == TAIL_LSE else self.v.shape[3]
        if (value.shape[0], value.shape[1], value.shape[3]) != (self.q.shape[0], rows, width):
            raise MissingAnchor(f"the stored {name} has shape {tuple(value.shape)}, not that of this call")
        owner = "cond" if branch == "both" else branch
        of = [h - self.first_head for h in self._stored_heads(owner, name)]
        if local == of:
            return value
        return value[:, :, [of.index(h) for h in local]]

    # ---- geometry

    def checked_grid(self) -> tuple[int, int, int]:
        at = self.at
        if at.references:
            raise Unmet(
                f"the sequence holds {at.references} tokens of reference images beside the grid {at.grid}"
            )
        if self.num_text < 0 or (not at.joint and self.k.shape[1] != at.visual):
            raise Unmet(f"{self.k.shape[1]} tokens are not the grid {at.grid} plus text")
        return at.grid

    def text_rows(self, rows: int) -> slice:
        return slice(0, self.num_text) if self.text_first else slice(rows - self.num_text, rows)

    def visual_rows(self, rows: int) -> slice:
        if self.num_text <= 0:
            return slice(0, rows)
        return slice(self.num_text, rows) if self.text_first else slice(0, rows - self.num_text)
