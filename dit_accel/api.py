"""All a user must read: accelerate, accelerated, restore, report, compile."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from dit_accel import compat, other_caches, plan
from dit_accel.errors import AlreadyAccelerated, UnsupportedPipeline
from dit_accel.families import family_of
from dit_accel.install import Installation, other_installation
from dit_accel.inventory import describe
from dit_accel.recipe import Recipe
from dit_accel.run_report import Report
from dit_accel.session import Session
from dit_accel.sites import Denoiser

# a handle lives as long as what it installed: were it held here, a bare denoiser as key would never be freed
_HANDLES: "weakref.WeakKeyDictionary[Any, Callable[[], Handle | None]]" = weakref.WeakKeyDictionary()


class Handle:
    """An accelerated pipeline; keep it to read the report or to undo."""

    def __init__(self, pipe: Any, recipe: Recipe, session: Session, installation: Installation | None):
        self.recipe = recipe
        self._pipe = weakref.ref(pipe)
        self._session = session
        self._installation = installation
        if installation is not None:
            installation.handle = self

    @property
    def session(self) -> Session:
        """The state of the runs, for searches that change the plan between two forwards."""
        return self._session

    @property
    def plan(self) -> plan.Plan | None:
        """The recipe resolved against the last run's schedule; None before the first run."""
        return self._session.plan

    def report(self) -> Report:
        """What the last run skipped, reused and computed, and why."""
        return self._session.report()

    def explain(self) -> str:
        """The plan as a picture in text, and what came of it in the last run."""
        current = self.plan
        if current is None:
            return f"recipe {self.recipe.name}: the plan is made when a run starts; run the pipeline once"
        happened = self.report().notes[len(current.notes) :]
        return "\n".join([current.explain(), *happened])

    def restore(self) -> None:
        """Undo everything; the pipeline gives bit-equal output to before. Calling it twice is harmless."""
        if self._installation is not None:
            self._installation.remove()
            self._installation = None
            self._session.memory.release()
        pipe = self._pipe()
        if pipe is not None and _find(pipe) is self:
            del _HANDLES[pipe]


def accelerate(pipe: Any, recipe: str | Recipe, *, strict: bool = False, replace: bool = False) -> Handle:
    """Install a recipe on a pipeline (or on a bare denoiser module).

    `recipe` is the name of a shipped recipe, a path, a Hub id or a Recipe. With `strict` every fallback to
    the model's own computation, and a run in which the recipe changed nothing, is an error; without it the
    report says so. A pipeline of an unknown family runs dense, with a warning. Raises RecipeError if the
    recipe does not fit the pipeline, AlreadyAccelerated on a second call without `replace`, and OtherCache
    where a cache of diffusers or cache-dit is enabled and the recipe is not exact; nothing is then changed.
    """
    loaded = Recipe.load(recipe)
    denoisers = _denoisers(pipe, strict)
    if not loaded.is_exact():
        other_caches.refuse(pipe, {name: module for name, (module, _) in denoisers.items()})
    _refuse_second(pipe, replace, [module for module, _ in denoisers.values()])
    records: dict[str, tuple[Denoiser, Any]] = {
        name: (describe(name, module, family), family) for name, (module, family) in denoisers.items()
    }
    if records:
        plan.check(loaded, tuple(record for record, _ in records.values()))
    restore(pipe)
    session = Session(loaded, records, pipe, strict)
    modules = {name: module for name, (module, _) in denoisers.items()}
    handle = Handle(pipe, loaded, session, Installation(session, modules) if modules else None)
    _HANDLES[pipe] = weakref.ref(handle) if modules else lambda: handle
    return handle


@contextlib.contextmanager
def accelerated(pipe: Any, recipe: str | Recipe, *, strict: bool = False) -> Iterator[Handle]:
    """`accelerate` for the length of a `with` block; restores also when the block raises."""
    handle = accelerate(pipe, recipe, strict=strict)
    try:
        yield handle
    finally:
        handle.restore()


def restore(pipe: Any) -> None:
    """Undo `accelerate`; harmless on a pipeline that is not accelerated."""
    handle = _find(pipe)
    if handle is not None:
        handle.restore()


def report(pipe: Any) -> Report:
    """The report of the pipeline's last run."""
    return _handle(pipe).report()


def compile(pipe: Any, **arguments: Any) -> None:
    """Compile the pipeline's blocks so that all layers share their graphs, with or without a recipe.

    `arguments` go to torch.compile. Blocks that belong to a span are compiled beneath their hook. `restore`
    takes the compiled code away again where the pipeline is accelerated.
    """
    handle = _find(pipe)
    installation = handle._installation if handle else None
    hooked = {id(hook.module): hook for hook in (installation.block_hooks if installation else ())}
    for component, (module, family) in _denoisers(pipe, strict=True).items():
        gated = {site for name, site in (installation.gated if installation else ()) if name == component}
        for path in describe(component, module, family).blocks:
            block = module.get_submodule(path)
            # a sublayer that may be skipped breaks the graph of its block: compile what stands beside it
            whole = not any(site.startswith(f"{path}.") for site in gated)
            if whole and id(block) in hooked:
                hooked[id(block)].compile_beneath(**arguments)
                continue
            names = () if whole else family.sublayers
            parts = (
                [block] if whole else [block.get_submodule(n) for n in names if f"{path}.{n}" not in gated]
            )
            for part in parts:
                part.compile(**arguments)
                if installation is not None:
                    installation.defer(functools.partial(compat.set_compiled_call, part, None))


def _find(pipe: Any) -> Handle | None:
    known = _HANDLES.get(pipe)
    return None if known is None else known()


def _handle(pipe: Any) -> Handle:
    handle = _find(pipe)
    if handle is None:
        raise UnsupportedPipeline(
            f"a report of {type(pipe).__name__} was asked for, but it is not accelerated. "
            f"Call dit_accel.accelerate(pipe, recipe) first."
        )
    return handle


def _refuse_second(pipe: Any, replace: bool, modules: Iterable[nn.Module]) -> None:
    handle = _find(pipe)
    if handle is not None and not replace:
        raise AlreadyAccelerated(
            f"{type(pipe).__name__} already runs recipe {handle.recipe.name}. "
            f"Call restore() on it first, or pass replace=True."
        )
    own = handle._installation if handle else None
    if any(other_installation(module, own) for module in modules):
        raise AlreadyAccelerated(
            f"a denoiser of this {type(pipe).__name__} belongs to another pipeline that is accelerated. "
            f"Call restore() on that one first."
        )


def _denoisers(pipe: Any, strict: bool) -> dict[str, tuple[nn.Module, Any]]:
    """The denoisers of a pipeline with their families; {} and a warning where none is known."""
    if isinstance(pipe, nn.Module):
        candidates = {"transformer": pipe}
    else:
        candidates = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    modules = {name: compat.unwrap_compiled(m) for name, m in candidates.items() if isinstance(m, nn.Module)}
    found = {name: (m, family) for name, m in modules.items() if (family := family_of(m)) is not None}
    if found:
        return found
    text = (
        f"{type(pipe).__name__} has no denoiser of a known family "
        f"(found: {', '.join(type(m).__name__ for m in modules.values()) or 'no transformer'}). "
        f"Describe it with dit_accel.register_family, or run it without a recipe."
    )
    if strict or not modules:
        raise UnsupportedPipeline(text)
    import warnings

    warnings.warn(f"dit_accel: {text} It runs dense.", stacklevel=4)
    return {}
