"""Forwards of a denoiser under any plan, repeated inside one step of a running pipeline.

A hook outside of the session's own takes every call that the pipeline makes of a denoiser; hooks on its
blocks note the streams that enter them. A later forward of the same step may begin at any block with the
streams noted there: of all that a candidate of layer i shares with the one before it nothing runs twice.
The values a forward reads were stored by the session, by the methods' own code; one whose plan keeps nothing
stores nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dit_accel.errors import DitAccelError
from dit_accel.families.base import Family
from dit_accel.plan import Plan
from dit_accel.search.calls import Arguments, by_name
from dit_accel.session import Forward, Session

OUTER, BLOCK = "dit_accel_search", "dit_accel_search_block"

Streams = tuple[Tensor, ...]
Answer = Callable[[str, Arguments], Any]  # (component, arguments) -> what the pipeline gets


@dataclass(frozen=True)
class Ran:
    """One forward of every branch: outputs, and the streams that entered each block, by branch."""

    outputs: Mapping[str, Any]
    entered: Mapping[str, Mapping[int, Streams]]


@dataclass
class _Beginning:
    """Where a forward begins, and what enters the blocks from there on."""

    block: int = 0
    streams: Streams = ()
    entered: dict[int, Streams] = field(default_factory=dict[int, Streams])
    at: Forward | None = None


class Forwards:
    """Takes the calls that a pipeline makes of its denoisers, and makes forwards in their place."""

    def __init__(self, session: Session, modules: Mapping[str, nn.Module], answer: Answer):
        self.session, self.modules = session, dict(modules)
        self.beginning = _Beginning()
        self._answer, self._inside = answer, False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the pipeline's calls while the block of `with` runs."""
        hooked: list[tuple[nn.Module, str]] = []
        try:
            for component, module in self.modules.items():
                family = self.session.families[component]
                for number, path in enumerate(self.session.denoisers[component].blocks):
                    block = module.get_submodule(path)
                    _register(block, _BlockHook(self, family, number), BLOCK)
                    hooked.append((block, BLOCK))
                _register(module, _OuterHook(self, component), OUTER)
                hooked.append((module, OUTER))
            yield
        finally:
            for module, name in hooked:
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)

    def run(
        self, component: str, calls: Mapping[str, Arguments], plan: Plan | None = None,
        block: int = 0, entered: Mapping[str, Mapping[int, Streams]] | None = None,
    ) -> Ran:  # fmt: skip
        """One forward of each branch under `plan` (None: the session's), from `block` on."""
        if plan is not None:
            self.session.plan = plan
        outputs: dict[str, Any] = {}
        noted: dict[str, Mapping[int, Streams]] = {}
        for branch, arguments in calls.items():
            before = dict(entered[branch]) if entered is not None else {}
            self.beginning = _Beginning(block, before.get(block, ()))
            outputs[branch] = self._forward(component, branch, arguments)
            noted[branch] = before | self.beginning.entered
        return Ran(outputs, noted)

    def _forward(self, component: str, branch: str, arguments: Arguments) -> Any:
        module = self.modules[component]
        named = branch in ("cond", "uncond") and hasattr(module, "cache_context")
        context = module.cache_context(branch) if named else contextlib.nullcontext()  # pyright: ignore
        self._inside = True
        try:
            with context:  # pyright: ignore[reportGeneralTypeIssues]
                return module(**arguments)
        finally:
            self._inside = False

    def take(self, component: str, arguments: Arguments, inner: Callable[..., Any]) -> Any:
        """A call of a denoiser: one of ours goes on, one of the pipeline is answered."""
        return inner(**arguments) if self._inside else self._answer(component, arguments)


def _register(module: nn.Module, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


class _InPlace(ModelHook):
    """A hook that stands in for a forward."""

    def original(self) -> Callable[..., Any]:
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward


class _OuterHook(_InPlace):
    def __init__(self, forwards: Forwards, component: str):
        super().__init__()
        self.forwards, self.component = forwards, component

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.forwards.take(self.component, by_name(module, args, kwargs), self.original())


class _BlockHook(_InPlace):
    def __init__(self, forwards: Forwards, family: Family, number: int):
        super().__init__()
        self.forwards, self.family, self.number = forwards, family, number

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        beginning, arguments = self.forwards.beginning, by_name(module, args, kwargs)
        names = [name for name in self.family.streams if arguments.get(name) is not None]
        streams = tuple(arguments[name] for name in names)
        beginning.at = self.forwards.session.at
        if self.number < beginning.block:
            return self._returned(names, streams)
        if self.number == beginning.block and beginning.streams:
            streams = beginning.streams
        beginning.entered[self.number] = streams
        return self.original()(**{**arguments, **dict(zip(names, streams, strict=True))})

    def _returned(self, names: Sequence[str], streams: Streams) -> Any:
        """What a block that does not run gives out: its streams, which the first that runs replaces."""
        by_name = dict(zip(names, streams, strict=True))
        returned = tuple(by_name[name] for name in self.family.returns)
        return returned[0] if len(returned) == 1 else returned


def other_branch(cond: Arguments, first: Mapping[str, Arguments], branch: str) -> Arguments:
    """The arguments of a branch's call that is yet to come, from cond's call of the same step.

    What differed between the branches at the first step is taken from there: texts and their masks. Latents
    and timesteps are those of the running step.
    """
    own = {name: value for name, value in first[branch].items() if not same(value, first["cond"].get(name))}
    return {**cond, **own}


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors by their values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (
            one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def check_foreseen(component: str, branch: str, foreseen: Arguments, found: Arguments) -> None:
    """Raise where a branch's call is not the one that was searched for it."""
    wrong = [name for name in {**foreseen, **found} if not same(foreseen.get(name), found.get(name))]
    if wrong:
        raise DitAccelError(
            f"asked to search both branches of a step together; {component} got another "
            f"{', '.join(wrong)} for {branch} than at the first step. Such a pipeline cannot be searched."
        )


def tensor_of(output: Any) -> Tensor:
    """The denoiser's output tensor."""
    return output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
