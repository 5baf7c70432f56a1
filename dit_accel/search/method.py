"""What every search that runs along the pipeline is to the command around it: DiTFastAttn, and by head V2.

A search decides step by step while the pipeline generates, can be left when a budget ends, and goes on from
what was decided. The rest of the command (goal, budget, state file, verification, page) knows no more of it.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from dit_accel.errors import BadUsage, DitAccelError
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.saved import digest_of
from dit_accel.search.subject import Subject, check_memory, denoisers_of

Ended = Callable[[], bool]
Told = Callable[[int, int], None]  # (done, total), in decisions
FULLS = {"model": {}, "auto": {"backend": "auto"}}  # parameters of `full` in a recipe


class TimeIsUp(DitAccelError):
    """Raised inside a search to leave the pipeline when the budget ends; caught by `Search.search`."""


@dataclass(kw_only=True)
class Decided(ABC):
    """What a search has decided so far; a search adds its picks. All of it can be written as JSON."""

    notes: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    finished: bool = False

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps at which anything was decided."""

    def note(self, text: str) -> None:
        """A sentence for the user, once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_dict(self) -> dict[str, Any]:
        """For the state file; the class's constructor takes it back."""
        return asdict(self)


@dataclass(frozen=True)
class Search(Subject, ABC):
    """A subject and a way to search it."""

    memory_gb: float | None = None  # [limits] of the recipe, and what the search itself may keep
    full: str = "model"  # who attends for full heads, and across: the model, or the fastest backend

    name: ClassVar[str]
    decided: ClassVar[type[Decided]]

    @property
    @abstractmethod
    def first_delta(self) -> float:
        """Where the search for a goal begins."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the decisions depend on besides the subject and delta."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """What a search keeps at most."""

    @abstractmethod
    def recipe_of(self, decisions: Any) -> Recipe:
        """The recipe of what is decided; what is not stays full."""

    @abstractmethod
    def picture(self, delta: float, decisions: Any) -> str:
        """What was chosen and the errors behind it, as HTML."""

    @abstractmethod
    def run(self, delta: float, decisions: Any, ended: Ended, saved: Callable[[], None], told: Told) -> None:
        """One generation that decides what is left open; raises TimeIsUp when `ended`."""

    def check(self) -> None:
        """Raise BadUsage for what cannot be run."""
        if self.full not in FULLS:
            raise BadUsage(
                f'asked for full heads by "{self.full}"; known: {", ".join(FULLS)}. Give one of them.'
            )
        check_memory(self, self.stored_bytes(), self.memory_gb)

    def always_full(self) -> list[Key]:
        """Layers that are not searched, and full through a backend: the cross-attention."""
        return self.cross_attention() if FULLS[self.full] else []

    def search(
        self, delta: float, decisions: Any, ended: Ended, saved: Callable[[], None], told: Told
    ) -> Recipe:
        """Decide what `decisions` leaves open, and give the recipe. Ends early, all else full, when `ended`.

        `saved` is called after every decision, `told(done, total)` as well, in decisions.
        """
        if not decisions.finished:
            began = time.perf_counter() - decisions.seconds

            def keep() -> None:
                decisions.seconds = time.perf_counter() - began
                saved()

            try:
                self.run(delta, decisions, ended, keep, told)
                decisions.finished = True
            except TimeIsUp:
                pass
            keep()
        return self.recipe_of(decisions)

    def asked(self) -> dict[str, Any]:
        """All that a search depends on, but for delta: equal ones give equal decisions."""
        return asked_of(self) | {"method": self.name, **self.settings}


def asked_of(subject: Subject) -> dict[str, Any]:
    """What is searched, as JSON: the model and its weights, the call, the prompts, the layers."""
    arguments = {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in subject.arguments.items()
    }
    return {
        "model": subject.model.name,
        "weights": digest_of(denoisers_of(subject.model)),
        "arguments": arguments,
        "prompts": [f"{job.seed}: {job.prompt}" for job in subject.jobs],
        "levels": list(subject.levels),
        "sites": list(subject.sites),
    }
