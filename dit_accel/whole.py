"""The whole denoiser as one site of the timeline: it runs, or a sum of its old outputs and inputs answers.

Both are latents: to keep them costs a fraction of what a block's streams cost, and an answer runs no layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel import units
from dit_accel.plan import Key
from dit_accel.session import Session
from dit_accel.sites import DENOISER
from dit_accel.timeline import INPUT, Track

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


def visit(session: Session, component: str, run: Run, x: Tensor, arguments: Arguments) -> Tensor:
    """The denoiser's output [B, ...] for its input `x`; `run(args, kwargs)` computes it."""
    key, at = (component, DENOISER), session.at
    track = session.track("timeline", key)
    if track is None or at is None:
        return run(*arguments)
    if at.branch != "both" or track.together:
        return _answer(session, key, track, at.branch, lambda: run(*arguments), x)
    if all(track.entry(at.step, branch).computes for branch in track.entries):
        return _whole_batch(session, key, track, run(*arguments), x)
    out: dict[str, Tensor] = {}
    for index, branch in ((1, "cond"), (0, "uncond")):  # cond first: uncond may read what it stores
        half = _half(arguments, at.batch, index)
        with session.only(branch):
            out[branch] = _answer(
                session, key, track, branch, lambda half=half: run(*half), x.chunk(2)[index]
            )
    return torch.cat([out["uncond"], out["cond"]])


def _answer(
    session: Session, key: Key, track: Track, branch: str, run: Callable[[], Tensor], x: Tensor
) -> Tensor:
    assert session.at is not None
    entry = track.entry(session.at.step, branch)
    units.keep(session, key, track, branch, (x,), planned=True, names=(INPUT,))
    _, found = units.decide(session, key, track, branch, [])
    value = run() if found is None else found[0].value(x)
    units.keep(session, key, track, branch, (value,), planned=found is not None or entry.computes)
    return value


def _whole_batch(session: Session, key: Key, track: Track, out: Tensor, x: Tensor) -> Tensor:
    """Both branches were computed in one go: as the pipeline would, to the last bit."""
    for index, branch in ((1, "cond"), (0, "uncond")):
        with session.only(branch):
            units.keep(session, key, track, branch, (x.chunk(2)[index],), planned=True, names=(INPUT,))
            units.decide(session, key, track, branch, [])
            units.keep(session, key, track, branch, (out.chunk(2)[index],), planned=True)
    return out


def _half(arguments: Arguments, batch: int, index: int) -> Arguments:
    """The uncond (0) or cond (1) half of the denoiser's arguments, of dictionaries of conditions too."""
    args, kwargs = units.halve(*arguments, batch, index)

    def inside(value: Any) -> Any:
        return units.halve((), value, batch, index)[1] if isinstance(value, Mapping) else value

    return tuple(map(inside, args)), {name: inside(value) for name, value in kwargs.items()}
