"""Where the seconds of a generation go: the whole of it, each attention module, and the call inside of it.

All of it in the place where it runs. A call that is timed apart, or between others, finds other caches: the
model's own attention then took longer than the whole module around it.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_accel import api
from dit_accel.generate import generate
from dit_accel.plan import Key
from dit_accel.recipe import Recipe
from dit_accel.search.plan.scores import full_of, stands
from dit_accel.search.subject import Subject, denoisers_of
from dit_accel.stages import now
from dit_accel.visit import AttentionVisit

Spent = dict[Key, list[float]]


@dataclass(frozen=True)
class ModuleSeconds:
    """One attention module on one branch: `around` its attention call, and the call in two ways."""

    around: float
    dense: float  # by the model
    full: float  # through the fastest backend


@dataclass(frozen=True)
class Seconds:
    """A dense generation, what of it is outside of the attention modules, and one call of each."""

    whole: float
    rest: float
    modules: dict[Key, ModuleSeconds]


def measure(subject: Subject) -> Seconds:
    """Time one dense generation after another that warms up, and one whose attention is watched.

    What is outside of the modules is known from the dense one: watching slows what it watches.
    """
    job = subject.jobs[0]
    generate(subject.model, job.prompt, subject.arguments, job.seed)
    with _timed_modules(subject) as inside:
        whole = generate(subject.model, job.prompt, subject.arguments, job.seed).seconds
    rest = whole - sum(sum(calls) for calls in inside.values())
    together = 2 if subject.family.guidance == "batched" else 1
    modules, calls = _watched(subject)
    found = {}
    for key in subject.all_attention():
        around = median(whole - call for whole, (_, call) in zip(modules[key], calls[key], strict=True))
        dense, full = (median(call for kind, call in calls[key] if kind == name) for name in KINDS)
        found[key] = ModuleSeconds(max(around, 0.0) / together, dense / together, full / together)
    return Seconds(whole, rest, found)


KINDS = ("dense", "full")  # at even steps, and at odd ones


@dataclass(frozen=True)
class Watched:
    """Stands where a method would: full attention, by the model or through a backend, and its seconds."""

    calls: list[tuple[str, float]]

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        kind = KINDS[visit.step % 2]
        began = now()
        out = visit.dense() if kind == "dense" else full_of(visit)
        spent = now() - began
        if visit.again:  # image keys of Wan I2V: one module, two calls
            spent += self.calls.pop()[1]
        self.calls.append((kind, spent))
        return out

    def __hash__(self) -> int:
        return id(self)


def _watched(subject: Subject) -> tuple[Spent, dict[Key, list[tuple[str, float]]]]:
    """Seconds of every module call, and of the attention call in it."""
    job, keys = subject.jobs[0], subject.all_attention()
    calls: dict[Key, list[tuple[str, float]]] = {key: [] for key in keys}
    methods = {key: Watched(calls[key]) for key in keys}
    with api.accelerated(subject.model.pipe, Recipe.neutral()) as handle:
        session = handle.session
        session.plan = stands(session.denoisers, keys, subject.levels, lambda key, _branch: methods[key])
        with _timed_modules(subject) as modules:
            generate(subject.model, job.prompt, subject.arguments, job.seed)
    return modules, calls


@contextlib.contextmanager
def _timed_modules(subject: Subject) -> Iterator[Spent]:
    spent: Spent = {key: [] for key in subject.all_attention()}
    began: dict[Key, float] = {}
    hooks: list[Any] = []

    def start(key: Key) -> Callable[..., None]:
        def note(*_given: Any) -> None:
            began[key] = now()

        return note

    def stop(key: Key) -> Callable[..., None]:
        def note(*_given: Any) -> None:
            spent[key].append(now() - began[key])

        return note

    for key in spent:
        module: nn.Module = denoisers_of(subject.model)[key[0]].get_submodule(key[1])
        hooks += [module.register_forward_pre_hook(start(key)), module.register_forward_hook(stop(key))]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
