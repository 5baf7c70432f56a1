"""Visual tokens in brick order for a whole forward: put there before the first block, back after the last.

A family names the submodules between which its tokens run (`Family.places`): hooks on their outputs put
tokens and positions in brick order, and what leaves the last one in the model's own. The blocks themselves,
compiled or not, see nothing of it. Norms, projections, modulation and dense attention do not ask where a
token stands. Whether it is done is decided by run and denoiser; what stands in the way is told in the
report, and then every attention call puts its tokens in brick order and back.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.block_heads import orders
from dit_accel.bricks import Grid
from dit_accel.families.base import Place
from dit_accel.plan import Plan
from dit_accel.proxy import SESSIONS, Installed, Proxy
from dit_accel.recipe import Recipe
from dit_accel.session import Forward, Session

ONCE = "visual tokens are put in bricks of {} once per forward"
RASTER = "visual tokens keep the model's order between blocks: {}"


def may_order(recipe: Recipe) -> bool:
    """Whether a recipe could want another order of tokens than the model's."""
    methods = (recipe.method(letter) for letter in recipe.choices)
    return bool(recipe.attention) and any(hasattr(method, "brick_on") for method in methods)


def decide(session: Session, module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Settle for the forward that begins in which order its visual tokens run.

    A run that cannot have brick order once goes on in the model's own: stored values are kept by order.
    """
    at, plan = session.at, session.plan
    if not session.active or at is None or plan is None:
        return
    key = at.component, at.grid
    if key not in session.bricks:
        session.bricks[key] = _bricks(plan, at.component, at.grid)
    bricks = session.bricks[key]
    if not any(bricks):
        return
    reason = session.raster.get(at.component)
    reason = reason or _hindrance(session, at, module, bricks) or _odd_input(session, at, inputs)
    if reason is not None:
        session.raster[at.component] = reason
        session.note_once(RASTER.format(reason), "")
        return
    brick = next(brick for brick in bricks if brick is not None)
    session.place(brick)
    session.note_once(ONCE.format("x".join(map(str, brick))), "")


def _bricks(plan: Plan, component: str, grid: Grid) -> frozenset[Grid | None]:
    """The bricks in whose order the methods of a plan want their tokens; None: the model's own order."""
    tracks = [track for key, track in plan.attention.items() if key[0] == component]
    entries = [entry for track in tracks for branch in track.entries.values() for entry in branch]
    methods = {method for entry in entries for method, _ in entry.groups if method is not None}
    ordered = [m for m in methods if m.needs_grid and not getattr(m, "any_order", False)]
    return frozenset(m.brick_on(grid) if hasattr(m, "brick_on") else None for m in ordered)


def _hindrance(
    session: Session, at: Forward, module: nn.Module, bricks: frozenset[Grid | None]
) -> str | None:
    """What of the model or the plan needs the model's own order, or None."""
    family = session.families[at.component]
    if None in bricks:
        return "a method of the recipe needs it"
    if len(bricks) > 1:
        return f"methods of the recipe lie in {len(bricks)} sizes of bricks"
    if not family.places:
        return f"family {family.name} does not say where they could be put in another"
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    if owner.__name__ not in family.transformers:
        return f"{owner.__name__} has a forward of its own"
    if compat.is_sharded(module):
        return "ranks split the sequence"
    for site in session.denoisers[at.component].self_attention:
        processor: Any = module.get_submodule(site).processor
        processor = processor.originals[0] if isinstance(processor, Proxy) else processor
        if not type(processor).__module__.startswith("diffusers."):
            return f"{type(processor).__name__} is not an attention processor of diffusers"
    return None


def _odd_input(session: Session, at: Forward, inputs: Mapping[str, Any]) -> str | None:
    """What of this forward's inputs needs the model's own order, or None."""
    family = session.families[at.component]
    if torch.is_grad_enabled():
        return "gradients may be wanted"
    if at.references:
        return "the sequence holds reference images"
    for name in family.raster_arguments:
        if inputs.get(name) is not None:
            return f"{name} is given in it"
    for name in ("attention_kwargs", "cross_attention_kwargs"):
        for key, value in (inputs.get(name) or {}).items():
            if isinstance(value, Tensor):
                return f"{name} holds the tensor {key}"
    for name, axis in family.placed_arguments.items():
        for tensor in _tensors(inputs.get(name)):
            if tensor.ndim > axis and tensor.shape[axis] not in (1, at.visual):
                return f"{name} has {tensor.shape[axis]} rows for {at.visual} tokens"
    return None


def arguments(
    session: Session, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A denoiser's arguments with those that run along the visual tokens in the order of the forward.

    `names` are those of the positional arguments. Whoever passed one by name finds it by name.
    """
    at = session.at
    if at is None or at.brick is None:
        return args, kwargs
    placed = list(args), dict(kwargs)
    for name, axis in session.families[at.component].placed_arguments.items():

        def put(tensor: Tensor, axis: int = axis) -> Tensor:
            runs_along = tensor.ndim > axis and tensor.shape[axis] == at.visual
            return _move(tensor, at, axis, False, False) if runs_along else tensor

        if name in kwargs:
            placed[1][name] = _each(kwargs[name], put)
        elif name in names[: len(args)]:
            number = names.index(name)
            placed[0][number] = _each(args[number], put)
    return tuple(placed[0]), placed[1]


class PlaceHook(ModelHook):
    """Puts what a submodule gives out in the order of the running forward, or back in the model's own."""

    def __init__(self, installed: Installed, place: Place):
        super().__init__()
        self.installed, self.place = installed, place
        self.number = torch.tensor(installed.number)  # a Python number would be a guard of the graph

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The output, its tokens moved."""
        place = self.place
        if torch.compiler.is_compiling():
            return _each(output, self._move_compiled, place.items)
        at = self.installed.session.at
        if at is None or at.brick is None:
            return output
        return _each(output, lambda x: _move(x, at, place.axis, place.spread, place.back), place.items)

    def _move_compiled(self, tensor: Tensor) -> Tensor:
        return _op(tensor, self.number, self.place.axis, self.place.spread, self.place.back)


def _move(tensor: Tensor, at: Forward, axis: int, spread: bool, back: bool) -> Tensor:
    """The last rows along an axis, as many as there are visual tokens, in the other order."""
    assert at.brick is not None
    order = orders(at.grid, at.brick, 0, False, tensor.device)[int(back)]
    rows = tensor.flatten(axis, axis + 2) if spread else tensor
    text = rows.shape[axis] - len(order)
    if text:  # [text, visual]: the text stays
        order = torch.cat([torch.arange(text, device=order.device), order + text])
    return rows.index_select(axis, order).view(tensor.shape)


def _move_by_number(tensor: Tensor, number: Tensor, axis: int, spread: bool, back: bool) -> Tensor:
    installed = SESSIONS.get(int(number))
    at = installed.session.at if installed is not None else None
    if at is None or at.brick is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    return _move(tensor, at, axis, spread, back)


_op = torch.library.custom_op("dit_accel::place", _move_by_number, mutates_args=())


@_op.register_fake
def _(tensor, number, axis, spread, back):  # pyright: ignore
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _tensors(value: Any) -> list[Tensor]:
    several = value if isinstance(value, tuple | list) else (value,)
    return [x for x in several if isinstance(x, Tensor)]


def _each(value: Any, act: Callable[[Tensor], Tensor], items: tuple[int, ...] | None = None) -> Any:
    """A tensor, or those numbered `items` (None: all) of a tuple of tensors, replaced."""
    if isinstance(value, Tensor):
        return act(value)
    if not isinstance(value, tuple | list):
        return value
    chosen = [items is None or number in items for number in range(len(value))]
    return tuple(
        act(x) if wanted and isinstance(x, Tensor) else x for x, wanted in zip(value, chosen, strict=True)
    )
