"""The one file that changes an nn.Module: root hook, attention proxies, block hooks, and the undo of each.

An Installation belongs to one pipeline. Everything it puts on a module is recorded with its undo at the
moment it is put there, so a failure half-way and a later `restore` run the same list backwards.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from dit_accel import compat, placement, predict, spans, units
from dit_accel.inventory import child_of
from dit_accel.plan import Key
from dit_accel.proxy import KEY_ATTRIBUTE, Installed, Proxy, make_proxy
from dit_accel.session import Session
from dit_accel.sites import EVERYTHING, Span, match_attention, match_span

ROOT, BLOCK, PLACE = "dit_accel_root", "dit_accel_block", "dit_accel_place"


class Installation:
    """What we put on a pipeline's denoisers."""

    def __init__(self, session: Session, modules: Mapping[str, nn.Module]):
        self.session, self.modules = session, dict(modules)
        self.installed = Installed(session)
        self._undo: list[Callable[[], None]] = []
        self._proxies: dict[tuple[Any, ...], Proxy] = {}
        self.gated = _sublayer_sites(session)
        self.block_hooks: list[BlockHook] = []
        self._may_order = placement.may_order(session.recipe)
        self._placed: dict[Key, nn.Module] = {}  # (component, place) -> the module that carries its hook
        self.handle: Any = None  # kept alive by the hooks
        try:
            for component, module in self.modules.items():
                self._install(component, module)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Undo everything, last first."""
        while self._undo:
            self._undo.pop()()
        for module in self.modules.values():
            HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()
            _drop_empty_registries(module)

    def defer(self, undo: Callable[[], None]) -> None:
        """Add something to undo."""
        self._undo.append(undo)

    # ---- parts

    def _install(self, component: str, module: nn.Module) -> None:
        self._hook(module, RootHook(self, component), ROOT)
        self._receive_end_of_run(module)
        self.claim_processors(component)
        self.claim_places(component)
        for span in self._spans(component):
            for block in span.blocks:
                member = spans.Member(
                    (component, span.site),
                    block,
                    first=block == span.blocks[0],
                    last=block == span.blocks[-1],
                )
                hook = BlockHook(self.session, member, self.session.families[component])
                target = module.get_submodule(block)
                self._hook(target, hook, BLOCK)
                self.block_hooks.append(hook)
                hook.take_compiled_call(self.defer)
        HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()

    def _spans(self, component: str) -> list[Span]:
        denoiser = self.session.denoisers[component]
        patterns = {p for table in self.session.recipe.timeline.values() for p in table}
        found = [span for p in sorted(patterns) if (span := match_span(p, denoiser)) is not None]
        return list({span.site: span for span in found}.values())

    def _hook(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        if name == BLOCK:
            compat.hook_beneath_shards(registry, hook, name)
        else:
            registry.register_hook(hook, name)
        self.defer(lambda: registry.remove_hook(name, recurse=False))

    def _receive_end_of_run(self, module: nn.Module) -> None:
        """Pipelines call `_reset_stateful_cache` on every component that has it when a call ends."""
        if hasattr(module, compat.RESET_ATTRIBUTE):
            return
        registry = HookRegistry.check_if_exists_or_initialize(module)
        module.__dict__[compat.RESET_ATTRIBUTE] = registry.reset_stateful_hooks
        self.defer(lambda: module.__dict__.pop(compat.RESET_ATTRIBUTE, None))

    def claim_processors(self, component: str) -> None:
        """Put proxies on attention modules that have none: at install, and after the user replaced them."""
        module, denoiser = self.modules[component], self.session.denoisers[component]
        for site in denoiser.attention:
            attention = module.get_submodule(site)
            if isinstance(attention.processor, Proxy):
                continue
            if isinstance(attention.processor, nn.Module):
                self.session.fallback("has a processor with weights of its own and runs dense", site)
                continue
            self._claim((component, site), attention)

    def claim_places(self, component: str) -> None:
        """Hook submodules where token order may change: at install, and after LoRA wrapped one of them."""
        if not self._may_order:
            return
        root = self.modules[component]
        for place in self.session.families[component].places:
            key, module = (component, place.module), root.get_submodule(place.module)
            before = self._placed.get(key)
            if module is before:
                continue
            if before is None:
                self.defer(lambda key=key: self._release_place(key))
            else:
                self._release_place(key)
                _drop_empty_registries(before)
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(placement.PlaceHook(self.installed, place), PLACE)
            self._placed[key] = module
            HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()

    def _release_place(self, key: Key) -> None:
        HookRegistry.check_if_exists_or_initialize(self._placed.pop(key)).remove_hook(PLACE, recurse=False)

    def _claim(self, key: Key, attention: nn.Module) -> None:
        original: Any = attention.processor
        state = tuple(sorted((name, id(value)) for name, value in vars(original).items()))
        gate = self._gate if key in self.gated else None
        kind = (type(original), state, gate is not None)
        if kind not in self._proxies:
            self._proxies[kind] = make_proxy(original, gate)
        proxy = self._proxies[kind]
        if original not in proxy.originals:
            proxy.originals.append(original)
        attention.processor = proxy  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        attention.__dict__[KEY_ATTRIBUTE] = self.installed.key_of(*key)
        self.defer(lambda: self._release(attention, proxy, original))

    @staticmethod
    def _release(attention: nn.Module, proxy: Proxy, original: Any) -> None:
        if attention.processor is proxy:  # else the user has put another one there, which stays
            attention.processor = original
        attention.__dict__.pop(KEY_ATTRIBUTE, None)

    def _gate(self, attention: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A sublayer on the timeline: its module computes, or a stored output answers."""
        key = self.installed.sites[int(attention.__dict__[KEY_ATTRIBUTE][1])]
        session, track, at = self.session, self.session.track("timeline", key), self.session.at
        if track is None or at is None:
            return run(*args, **kwargs)
        if at.branch != "both" or track.together:
            return units.answer(session, key, at.branch, run, args, kwargs)
        out = []
        for index, branch in ((1, "cond"), (0, "uncond")):  # cond first: uncond may read what it stores
            half = units.halve(args, kwargs, at.batch, index)
            with session.only(branch):
                out.append(units.answer(session, key, branch, run, *half))
        if isinstance(out[0], Tensor):
            return torch.cat([out[1], out[0]])
        return tuple(torch.cat([u, c]) for u, c in zip(out[1], out[0], strict=True))


def other_installation(module: nn.Module, own: "Installation | None") -> bool:
    """Whether the denoiser carries the hook of another pipeline that shares it."""
    registry = module.__dict__.get(compat.REGISTRY_ATTRIBUTE)
    hook = registry.get_hook(ROOT) if registry is not None else None
    return isinstance(hook, RootHook) and hook.installation is not own


def _sublayer_sites(session: Session) -> set[Key]:
    """Attention modules that stand on the timeline: their whole module may be skipped."""
    patterns = {p for table in session.recipe.timeline.values() for p in table} - {EVERYTHING}
    return {
        (name, site)
        for name, one in session.denoisers.items()
        for p in patterns
        for site in match_attention(p, one)
    }


class _Hook(ModelHook):
    """A hook that replaces the forward of its module."""

    def original(self) -> Callable[..., Any]:
        """What the module's forward was before this hook."""
        forward = self.fn_ref.original_forward
        assert forward is not None
        return forward


class RootHook(_Hook):
    """Tells the session where the loop is, and guards the denoiser's output against non-finite values."""

    _is_stateful = True  # so that `cache_context` writes its context to our receiver

    def __init__(self, installation: Installation, component: str):
        super().__init__()
        self.installation, self.component = installation, component
        self.receiver = compat.context_receiver()

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.signature = inspect.signature(type(module).forward)
        self.names = list(self.signature.parameters)[1:]
        return module

    @torch.compiler.disable(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.original()
        try:
            placed_args, placed_kwargs = self._before(module, args, kwargs)
            output = forward(*placed_args, **placed_kwargs)
            if self._has_failed(output):
                output = forward(*args, **kwargs)
            return output
        finally:
            self._after()

    # hidden from Dynamo: where the whole denoiser is compiled it would trace the session's books into graphs

    @torch.compiler.disable(recursive=True)
    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open a forward; the arguments to go on with."""
        session = self.installation.session
        inputs = self.signature.bind(module, *args, **kwargs).arguments
        inputs = {**inputs, **inputs.pop("kwargs", {})}
        session.begin(self.component, module.config, compat.current_context(self.receiver), inputs)
        self.installation.claim_processors(self.component)
        self.installation.claim_places(self.component)
        placement.decide(session, module, inputs)
        for hook in self.installation.block_hooks:
            hook.take_compiled_call(self.installation.defer)
        predict.check_memory(session, module, inputs)
        return placement.arguments(session, self.names, args, kwargs)

    @torch.compiler.disable(recursive=True)
    def _has_failed(self, output: Any) -> bool:
        session = self.installation.session
        failed = bool(session.approximated) and not _finite(output)
        if failed:
            session.repeat_dense()
        return failed

    @torch.compiler.disable(recursive=True)
    def _after(self) -> None:
        self.installation.session.end()

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.installation.session.finish()
        return module


class BlockHook(_Hook):
    """One block of a span. Compiled code, if any, lies beneath it: decisions are made outside the graph."""

    def __init__(self, session: Session, member: spans.Member, family: Any):
        super().__init__()
        self.session, self.member, self.family = session, member, family
        self.compiled: Callable[..., Any] | None = None
        self._stand_in: Callable[..., Any] | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        self.module = module
        self.signature = inspect.signature(type(module).forward)
        return module

    def take_compiled_call(self, defer: Callable[[Callable[[], None]], None]) -> None:
        """If the user compiled this block, stand in front of the compiled call instead of inside its graph.

        Dynamo guards on the identity of a hooked `forward`, which would compile every layer anew.
        """
        call = compat.compiled_call(self.module)
        if call is None or call is self._stand_in:
            return
        HookRegistry.check_if_exists_or_initialize(self.module).remove_hook(BLOCK, recurse=False)
        self.compiled = call
        self._stand_in = functools.partial(self.new_forward, self.module)
        compat.set_compiled_call(self.module, self._stand_in)
        defer(lambda: compat.set_compiled_call(self.module, call))

    def compile_beneath(self, **arguments: Any) -> None:
        """Compile what this hook calls."""
        self.compiled = torch.compile(self.original(), **arguments)

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


def _finite(output: Any) -> bool:
    sample = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return bool(torch.isfinite(sample).all())


def _drop_empty_registries(module: nn.Module) -> None:
    """Leave no trace: without hooks a registry goes, and with it an instance's copy of `forward`."""
    for child in module.modules():
        registry = child.__dict__.get(compat.REGISTRY_ATTRIBUTE)
        if registry is None or registry.hooks:
            continue
        del child.__dict__[compat.REGISTRY_ATTRIBUTE]
        forward = child.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(child).forward:
            del child.__dict__["forward"]
