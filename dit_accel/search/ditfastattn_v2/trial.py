"""What stands at a layer while its heads are searched: it runs the library's own methods, head by head.

A method may store under one name only, and at a full pass every candidate stores: so each has an address of
its own here. Otherwise all is as in a run with the recipe: the same methods, kernels and order of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from dit_accel import block_heads
from dit_accel.block_heads import Part
from dit_accel.bricks import Grid
from dit_accel.errors import MissingAnchor
from dit_accel.memory import Address, Memory
from dit_accel.plan import Key
from dit_accel.search.ditfastattn_v2.candidates import DIFFER, FULL, IDLE, REUSE, Candidate, Menu
from dit_accel.timeline import DIFFERENCE, OUT, SHARED
from dit_accel.visit import AttentionVisit


@dataclass(frozen=True, eq=False)  # no two are equal, so a batched pair is never taken for one thing
class Trial:
    """Asks `answer` at one layer and branch; to the session it is a method like any other."""

    answer: Callable[[AttentionVisit], Tensor]
    menu: Menu

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True

    def brick_on(self, grid: Grid) -> Grid | None:
        """The brick in whose order its tokens may stand."""
        return self.menu.brick_on(grid)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, H, D]
        return self.answer(visit)


@dataclass(frozen=True)
class _Kept:
    """Where one candidate's values of a layer and branch are stored."""

    memory: Memory
    address: Address
    heads: int  # of the layer
    shared: Address  # where cond's answers are


@dataclass(frozen=True)
class _TrialVisit(AttentionVisit):
    """A visit that reads and stores what one candidate keeps."""

    kept: _Kept

    def recall(self, name: str, max_age: int) -> Tensor:
        return self._recall(self.kept.address, name, max_age)

    def recall_from_cond(self, name: str) -> Tensor:
        return self._recall(self.kept.shared, name, max_age=0)

    def _recall(self, address: Address, name: str, max_age: int) -> Tensor:
        slot = self.kept.memory.recall(address, name)
        made = {} if slot is None else slot.made_at
        if slot is None or any(self.step - made.get(head, -max_age - 1) > max_age for head in self.heads):
            raise MissingAnchor(f"no {name} at most {max_age} steps old")
        return slot.tensors[0][:, :, block_heads.run_of(self.heads)]

    def keep(self, name: str, value: Tensor) -> None:
        self.kept.memory.store_heads(
            self.kept.address, name, value, self.heads, range(self.kept.heads), self.step,
            places=range(len(self.heads)),
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """The heads of one layer on one branch, and what they keep."""

    menu: Menu
    memory: Memory
    key: Key
    branch: str

    def full(self, visit: AttentionVisit, heads: Sequence[int]) -> Tensor:  # [B, N, h, D]
        """Full attention of some heads, as the recipe has it."""
        return self.menu.full.attend(visit.of(heads))

    def tried(self, visit: AttentionVisit, candidate: Candidate, heads: Sequence[int]) -> Tensor:
        """What some heads would answer: [B, N, h, D]. Raises what the method raises."""
        return candidate.method.attend(self._visit(visit, candidate.letter, heads))

    def answer(self, visit: AttentionVisit, letters: str, cond: str = "") -> Tensor:  # [B, N, H, D]
        """Every head by its letter; what later steps may read is stored. `cond` are the letters of cond."""
        out = visit.q.new_empty((*visit.q.shape[:3], visit.v.shape[3]))
        parts: list[tuple[Sequence[int], Part]] = []
        for letter, heads in _groups(letters):
            if letter == FULL:
                out[:, :, block_heads.run_of(heads)] = self.full(visit, heads)
                continue
            method, own = self.menu.of(letter).method, self._visit(visit, letter, heads)
            if hasattr(method, "part"):
                parts.append((heads, method.part(own)))
            else:
                out[:, :, block_heads.run_of(heads)] = method.attend(own)
        if parts:
            block_heads.attend(visit.tokens(), parts, out)
        self._store(visit, letters, out)
        if self.menu.shares:
            self._store_shared(visit, letters, cond, out)
        return out

    def _store_shared(self, visit: AttentionVisit, letters: str, cond: str, out: Tensor) -> None:
        """What cond answers, or how uncond's answer differs from it where both were computed."""
        visual = out[:, visit.visual_rows]
        if self.branch == "cond":
            self._visit(visit, SHARED, range(len(letters))).keep(SHARED, visual)
            return
        both = [head for head, pair in enumerate(zip(letters, cond, strict=False)) if not IDLE & {*pair}]
        if both:
            own = self._visit(visit, DIFFER, both)
            own.keep(DIFFERENCE, visual[:, :, block_heads.run_of(both)] - own.recall_from_cond(SHARED))

    def _store(self, visit: AttentionVisit, letters: str, out: Tensor) -> None:
        full = [head for head, letter in enumerate(letters) if letter == FULL]
        # which of them a head will complete is not known yet: each costs a full pass
        for candidate in self.menu.anchored if full else ():
            candidate.method.anchor.attend(self._visit(visit, candidate.letter, full))
        computed = [head for head, letter in enumerate(letters) if letter not in IDLE]
        if computed and any(each.letter == REUSE for each in self.menu.candidates):
            self._visit(visit, REUSE, computed).keep(OUT, out[:, :, block_heads.run_of(computed)])

    def _visit(self, visit: AttentionVisit, letter: str, heads: Sequence[int]) -> _TrialVisit:
        shared = (*self.key, "cond", (SHARED,))
        kept = _Kept(self.memory, (*self.key, self.branch, (letter,)), visit.q.shape[2], shared)
        own = visit.of(heads)
        values: dict[str, Any] = {each.name: getattr(own, each.name) for each in fields(AttentionVisit)}
        return _TrialVisit(**values, kept=kept)


def _groups(letters: str) -> list[tuple[str, list[int]]]:
    """The heads of each letter."""
    return [(x, [head for head, own in enumerate(letters) if own == x]) for x in dict.fromkeys(letters)]
