"""Hooks on blocks and sublayers: they hand a call to `spans` or `units` and put what answers in its place.

Compiled code, if any, lies beneath them: decisions are made outside of the graph. `install.py` puts them on.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dit_accel import compat, spans, units
from dit_accel.inventory import child_of
from dit_accel.plan import Key
from dit_accel.session import Session

BLOCK, SUBLAYER = "dit_accel_block", "dit_accel_sublayer"


class Replacing(ModelHook):
    """A hook that replaces the forward of its module."""

    def original(self) -> Callable[..., Any]:
        """What the module's forward was before this hook."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward


class _Timeline(Replacing):
    """A hook whose module may be compiled: it stands in front of the compiled call, not inside its graph.

    Dynamo guards on the identity of a hooked `forward`, which would compile every layer anew.
    """

    name = ""
    new_forward: Callable[..., Any]

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.compiled: Callable[..., Any] | None = None
        self._stand_in: Callable[..., Any] | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.module = module
        return module

    def take_compiled_call(self, defer: Callable[[Callable[[], None]], None]) -> None:
        """If the user compiled this module, take the place of the compiled call."""
        call = compat.compiled_call(self.module)
        if call is None or call is self._stand_in:
            return
        HookRegistry.check_if_exists_or_initialize(self.module).remove_hook(self.name, recurse=False)
        self.compiled = call
        self._stand_in = functools.partial(self.new_forward, self.module)
        compat.set_compiled_call(self.module, self._stand_in)
        defer(lambda: compat.set_compiled_call(self.module, call))

    def compile_beneath(self, **arguments: Any) -> None:
        """Compile what this hook calls."""
        self.compiled = torch.compile(self.original(), **arguments)


class SublayerHook(_Timeline):
    """A feed-forward on the timeline."""

    name = SUBLAYER

    def __init__(self, session: Session, key: Key):
        super().__init__(session)
        self.key = key

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return units.visit(self.session, self.key, self.compiled or self.original(), args, kwargs)


class BlockHook(_Timeline):
    """One block of a span."""

    name = BLOCK

    def __init__(self, session: Session, member: spans.Member, family: Any):
        super().__init__(session)
        self.member, self.family = member, family

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.signature = inspect.signature(type(module).forward)
        return super().initialize_hook(module)

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # by name, as the block's own signature has it; streams and other arguments are told apart below
        names = list(self.signature.parameters)[1:]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        out = spans.visit(self.session, self.member, lambda half: self._call(arguments, half))
        return self._returned(out)

    def _call(self, arguments: dict[str, Any], half: int | None) -> spans.BlockCall:
        if half is not None and self.session.at is not None:
            _, arguments = units.halve((), arguments, self.session.at.batch, half, self.family.unbatched)
        streams = tuple(arguments[name] for name in self.family.streams if arguments.get(name) is not None)

        def run(streams: spans.Streams, forward: Callable[..., Any] | None = None) -> spans.Streams:
            call = forward or self.compiled or self.original()
            return self._streams(
                call(**{**arguments, **dict(zip(self.family.streams, streams, strict=False))})
            )

        def record(streams: spans.Streams) -> tuple[spans.Streams, dict[str, spans.Streams]]:
            with recording(self.module, self.family.sublayers) as outputs:
                return run(streams, self.original()), outputs

        def replay(streams: spans.Streams, stored: Mapping[str, spans.Streams]) -> spans.Streams:
            with replaying(self.module, stored):
                return run(streams, self.original())

        return spans.BlockCall(streams, run, record, replay)

    def _streams(self, output: Any) -> spans.Streams:
        """A block's output in the order of the family's streams."""
        if isinstance(output, Tensor):
            return (output,)
        by_name = dict(zip(self.family.returns, output, strict=True))
        return tuple(by_name[name] for name in self.family.streams)

    def _returned(self, streams: spans.Streams) -> Any:
        if len(self.family.returns) == 1:
            return streams[0]
        by_name = dict(zip(self.family.streams, streams, strict=True))
        return tuple(by_name[name] for name in self.family.returns)


@contextlib.contextmanager
def recording(block: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, spans.Streams]]:
    """Collect the outputs of a block's sublayers while it runs."""
    outputs: dict[str, spans.Streams] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = units.as_tuple(output)

        return keep

    handles = [
        child.register_forward_hook(keeper(name))
        for name in names
        if (child := child_of(block, name)) is not None
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def replaying(block: nn.Module, stored: Mapping[str, spans.Streams]) -> Iterator[None]:
    """Let a block's sublayers answer with stored outputs; norms, modulation and gates are the block's own."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for name, value in stored.items():
            child = block.get_submodule(name)
            before.append((child, child.__dict__.get("forward")))
            answer = value[0] if len(value) == 1 else value
            child.forward = lambda *_, __answer=answer, **___: __answer
        yield
    finally:
        for child, forward in before:
            if forward is None:
                del child.forward
            else:
                child.forward = forward
