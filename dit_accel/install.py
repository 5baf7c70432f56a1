"""The one file that changes an nn.Module: root hook, attention proxies, block hooks, and the undo of each.

An Installation belongs to one pipeline. Everything it puts on a module is recorded with its undo at the
moment it is put there, so a failure half-way and a later `restore` run the same list backwards.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dit_accel import compat, exact, other_caches, placement, predict, spans, units, whole
from dit_accel.block_hooks import BLOCK, SUBLAYER, BlockHook, Replacing, SublayerHook
from dit_accel.plan import Key
from dit_accel.proxy import KEY_ATTRIBUTE, Installed, Proxy, make_proxy
from dit_accel.session import Session
from dit_accel.sites import DENOISER, Span, match_span, match_sublayers

ROOT, PLACE = "dit_accel_root", "dit_accel_place"


class Installation:
    """What we put on a pipeline's denoisers."""

    def __init__(self, session: Session, modules: Mapping[str, nn.Module]):
        self.session, self.modules = session, dict(modules)
        self.installed = Installed(session)
        self._proxies: dict[tuple[Any, ...], Proxy] = {}
        self.gated = _sublayer_sites(session)
        self.block_hooks: list[BlockHook | SublayerHook] = []
        self.exact = exact.ExactTables(session, self.modules, self.block_hooks)
        self._undo: list[Callable[[], None]] = [self.exact.remove]
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
            drop_empty_registries(module)

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
                self._hook_timeline(module.get_submodule(block), hook, BLOCK)
        for site in self.session.denoisers[component].others:  # attention is gated by its proxy
            if (component, site) in self.gated:
                hook = SublayerHook(self.session, (component, site))
                self._hook_timeline(module.get_submodule(site), hook, SUBLAYER)
        HookRegistry.check_if_exists_or_initialize(module).invalidate_child_registries_cache()

    def _hook_timeline(self, module: nn.Module, hook: BlockHook | SublayerHook, name: str) -> None:
        self._hook(module, hook, name)
        self.block_hooks.append(hook)
        hook.take_compiled_call(self.defer)

    def _spans(self, component: str) -> list[Span]:
        denoiser = self.session.denoisers[component]
        patterns = {p for table in self.session.recipe.timeline.values() for p in table}
        found = [span for p in sorted(patterns) if (span := match_span(p, denoiser)) is not None]
        return list({span.site: span for span in found}.values())

    def _hook(self, module: nn.Module, hook: ModelHook, name: str) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        register = compat.hook_beneath_shards if name == BLOCK else HookRegistry.register_hook
        register(registry, hook, name)
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
                drop_empty_registries(before)
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
        return units.visit(self.session, key, run, args, kwargs)


def other_installation(module: nn.Module, own: "Installation | None") -> bool:
    """Whether the denoiser carries the hook of another pipeline that shares it."""
    registry = module.__dict__.get(compat.REGISTRY_ATTRIBUTE)
    hook = registry.get_hook(ROOT) if registry is not None else None
    return isinstance(hook, RootHook) and hook.installation is not own


def _sublayer_sites(session: Session) -> set[Key]:
    """Sublayers that stand on the timeline: their whole module may be skipped."""
    patterns = {p for table in session.recipe.timeline.values() for p in table}
    return {
        (name, site)
        for name, one in session.denoisers.items()
        for p in patterns
        for site in match_sublayers(p, one)
    }


class RootHook(Replacing):
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
            answer = functools.partial(self._answer, forward)
            output = self.installation.exact.call(answer, placed_args, placed_kwargs)
            if self._has_failed(output):
                output = self.installation.exact.call(forward, args, kwargs)
            return output
        finally:
            self._after()

    @torch.compiler.disable(recursive=False)
    def _answer(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The denoiser's output: computed, or summed up where the timeline has the whole denoiser."""
        session = self.installation.session
        if session.track("timeline", (self.component, DENOISER)) is None:
            return forward(*args, **kwargs)
        x = self.signature.bind(None, *args, **kwargs).arguments["hidden_states"]

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return forward(*args, **{**kwargs, "return_dict": False})[0]

        value = whole.visit(session, self.component, run, x, (args, kwargs))
        bound = self.signature.bind(None, *args, **kwargs)
        bound.apply_defaults()
        return Transformer2DModelOutput(sample=value) if bound.arguments["return_dict"] else (value,)

    # hidden from Dynamo: where the whole denoiser is compiled it would trace the session's books into graphs

    @torch.compiler.disable(recursive=True)
    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Open a forward; the arguments to go on with."""
        session = self.installation.session
        if not session.recipe.is_exact():
            other_caches.refuse_enabled(self.component, module)
        inputs = self.signature.bind(module, *args, **kwargs).arguments
        inputs = {**inputs, **inputs.pop("kwargs", {})}
        session.begin(self.component, module.config, compat.current_context(self.receiver), inputs)
        self.installation.claim_processors(self.component)
        self.installation.claim_places(self.component)
        placement.decide(session, module, inputs)
        for hook in self.installation.block_hooks:
            hook.take_compiled_call(self.installation.defer)
        predict.check_memory(session, module, inputs)
        self.installation.exact.begin(self.component, inputs)
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
        self.installation.exact.finish(self.installation.session.finish)
        return module


def _finite(output: Any) -> bool:
    sample = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return bool(torch.isfinite(sample).all())


def drop_empty_registries(module: nn.Module) -> None:
    """Leave no trace: without hooks a registry goes, and with it an instance's copy of `forward`."""
    for child in module.modules():
        registry = child.__dict__.get(compat.REGISTRY_ATTRIBUTE)
        if registry is None or registry.hooks:
            continue
        del child.__dict__[compat.REGISTRY_ATTRIBUTE]
        forward = child.__dict__.get("forward")
        if getattr(forward, "__func__", None) is type(child).forward:
            del child.__dict__["forward"]
