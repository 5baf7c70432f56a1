"""How much of the self-attention a run computed, in pairs of query and key, whatever left the rest out.

Visits are only counted while a run goes on; what a method's pairs come to on a grid is looked up when
somebody asks. Where a forward ran without the session everything was computed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dit_accel.bricks import Grid
from dit_accel.plan import Key
from dit_accel.sites import DENOISER, Denoiser, Span

Place = tuple[Grid, int]  # visual tokens, and text tokens in the same sequence


@dataclass
class Work:
    """Head visits of a run; a forward of a batched pair counts for both of its branches."""

    forwards: Counter[str] = field(default_factory=Counter[str])  # by denoiser
    idle: Counter[str] = field(default_factory=Counter[str])  # of these, with the model's own computation
    attended: Counter[tuple[Key, Any, Place]] = field(default_factory=Counter[tuple[Key, Any, Place]])
    skipped: Counter[Key] = field(
        default_factory=Counter[Key]
    )  # visits of modules and spans answered from memory

    def forward(self, component: str, branch: str, active: bool) -> None:
        """A forward begins."""
        self.forwards[component] += branches_of(branch)
        if not active:
            self.idle[component] += branches_of(branch)

    def attend(self, key: Key, branch: str, done: Mapping[Any, int], place: Place) -> None:
        """An attention call ran: how many heads each method served (None: the model)."""
        for method, heads in done.items():
            self.attended[key, method, place] += heads * branches_of(branch)

    def skip(self, key: Key, branch: str) -> None:
        """A module or a span of blocks answered from memory."""
        self.skipped[key] += branches_of(branch)

    def kept(self, denoisers: Mapping[str, Denoiser], spans: Mapping[Key, Span]) -> float | None:
        """Pairs computed over those of dense self-attention; None before any forward."""
        whole = done = 0.0
        for component, one in denoisers.items():
            for site, heads in one.self_attention.items():
                forwards = self.forwards[component]
                whole += heads * forwards
                done += heads * forwards * self._site((component, site), heads, spans) if forwards else 0.0
        return done / whole if whole else None

    def _site(self, key: Key, heads: int, spans: Mapping[Key, Span]) -> float:
        """The share of one site."""
        forwards, idle = self.forwards[key[0]], self.idle[key[0]]
        visits = [(method, place, n) for (of, method, place), n in self.attended.items() if of == key]
        if visits:  # where the module was skipped there is no visit
            return (idle + sum(n * share(method, place) for method, place, n in visits) / heads) / forwards
        skipped = sum(n for of, n in self.skipped.items() if of[0] == key[0] and _holds(of, key, spans))
        return 1.0 - skipped / forwards


def branches_of(branch: str) -> int:
    """How many branches a forward or a visit stands for."""
    return 2 if branch == "both" else 1


def share(method: Any, place: Place) -> float:
    """Pairs of query and key that a head of a method computes, over those of full attention."""
    if method is None:
        return 1.0
    if not method.computes:
        return 0.0
    return method.work(*place) if hasattr(method, "work") else 1.0


def _holds(outer: Key, key: Key, spans: Mapping[Key, Span]) -> bool:
    span = spans.get(outer)
    if outer[1] == DENOISER:
        return True
    return outer[1] == key[1] if span is None else key[1].rpartition(".")[0] in span.blocks
