"""A span of blocks at run time: each block runs, replays what is stored of its sublayers, or lets its streams
pass until the last block adds the span's residual. Holds no module; `block_hooks` calls it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel import units
from dit_accel.plan import Key
from dit_accel.session import Session
from dit_accel.timeline import DIFFERENCE, OUT, SHARED, Entry, Track, nodes_of

Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class BlockCall:
    """One call of one block, its residual streams apart from its other arguments."""

    streams: Streams  # in the order of the family's `streams`
    run: Callable[[Streams], Streams]
    record: Callable[[Streams], tuple[Streams, dict[str, Streams]]]  # also each sublayer's outputs
    replay: Callable[[Streams, Mapping[str, Streams]], Streams]  # the block's own code around stored outputs


@dataclass(frozen=True)
class Member:
    """A block's place in its span."""

    key: Key  # (component, span site)
    block: str
    first: bool
    last: bool


def visit(session: Session, member: Member, call: Callable[[int | None], BlockCall]) -> Streams:
    """Answer for one block. `call(half)` gives the whole call (None) or the uncond (0) or cond (1) half."""
    track = session.track("timeline", member.key)
    at = session.at
    if track is None or at is None:
        whole = call(None)
        return whole.run(whole.streams)
    if at.branch != "both" or track.together:
        return _branch(session, member, track, at.branch, call(None))
    halves = {"cond": call(1), "uncond": call(0)}  # cond first: uncond may read what it stores
    out: dict[str, Streams] = {}
    for branch, half in halves.items():
        with session.only(branch):
            out[branch] = _branch(session, member, track, branch, half)
    uncond, cond = out["uncond"], out["cond"]
    return tuple(torch.cat([u, c]) for u, c in zip(uncond, cond, strict=True))


@dataclass
class _State:
    """One span during one forward on one branch."""

    answer: str  # "compute", "replay" (the blocks' own code around stored sublayers) or "add" (a residual)
    inputs: Streams
    residual: units.Answer  # what is added; () if it can only be derived at the last block
    entry: Entry
    planned: bool  # whether running was the plan
    gates: set[str]  # of the branch's reuses: for "current" ones sublayer outputs are recorded


def _branch(session: Session, member: Member, track: Track, branch: str, call: BlockCall) -> Streams:
    slot = ("span", member.key, branch)
    if member.first:
        session.scratch[slot] = _open(session, member, track, branch, call.streams)
    state: _State = session.scratch[slot]
    if state.answer == "add":
        return _add(session, member, track, branch, call.streams, state) if member.last else call.streams
    if state.answer == "replay":
        out = call.replay(call.streams, _replayed(session, member, branch, state))
    else:
        out = _run(session, member, track, branch, call, state)
    if member.last:
        residual = tuple(after - before for after, before in zip(out, state.inputs, strict=True))
        _keep_residual(session, member, track, branch, residual, state)
    return out


def _open(session: Session, member: Member, track: Track, branch: str, streams: Streams) -> _State:
    """Decide at the span's first block."""
    cond = session.scratch.get(("span", member.key, "cond"))
    pending = branch == "uncond" and cond is not None  # a batched pair: cond's last block is yet to come
    shapes = [stream.shape for stream in streams]
    entry, found = units.decide(session, member.key, track, branch, shapes, cond_pending=pending)
    gates = gates_in_use(track, branch)
    if found is None:
        return _State("compute", streams, (), entry, entry.computes, gates)
    answer = "replay" if getattr(entry.groups[0][0], "gates", None) == "current" else "add"
    return _State(answer, streams, found, entry, True, gates)


def _add(
    session: Session, member: Member, track: Track, branch: str, streams: Streams, state: _State
) -> Streams:
    """The streams behind the span: the stored residuals, continued, on top of them."""
    residual = state.residual or units.derive(session, member.key, branch, state.entry)
    residual = residual[: len(streams)]
    if not units.kept(session, track, branch, planned=True):
        return tuple(each.added_to(x) for x, each in zip(streams, residual, strict=True))
    value = tuple(each.value(x) for x, each in zip(streams, residual, strict=True))
    units.keep(session, member.key, track, branch, value, planned=True)
    return tuple(x + r for x, r in zip(streams, value, strict=True))


def gates_in_use(track: Track, branch: str) -> set[str]:
    """Whose gates reuses of this branch have: "current" replays sublayers, "stored" adds a residual."""
    entries = track.entries["cond" if branch == "both" else branch]
    return {e.groups[0][0].gates for e in entries if hasattr(e.groups[0][0], "gates")}


def _run(
    session: Session, member: Member, track: Track, branch: str, call: BlockCall, state: _State
) -> Streams:
    if "current" not in state.gates or not units.kept(session, track, branch, state.planned, (OUT,)):
        return call.run(call.streams)
    assert session.at is not None
    out, sublayers = call.record(call.streams)
    depth = track.depths["cond" if branch == "both" else branch, OUT]
    for name, tensors in sublayers.items():
        address = session.address((member.key[0], f"{member.block}.{name}"), branch)
        session.memory.store(address, OUT, tensors, session.at.step, depth)
    return out


def _keep_residual(
    session: Session, member: Member, track: Track, branch: str, residual: Streams, state: _State
) -> None:
    """Spans that only replay keep an empty residual as the mark of a complete recording."""
    planned = state.planned
    if state.gates == {"current"}:
        units.keep(session, member.key, track, branch, (), planned, names=(OUT,))
        units.keep(session, member.key, track, branch, residual, planned, names=(SHARED, DIFFERENCE))
    else:
        units.keep(session, member.key, track, branch, residual, planned)


def _replayed(session: Session, member: Member, branch: str, state: _State) -> dict[str, Streams]:
    """What this block's sublayers answer: their recorded outputs, continued to this step."""
    prefix = f"{member.block}."
    layout = session.at.layout if session.at else ()
    found: dict[str, Streams] = {}
    for address, name in list(session.memory.slots):
        component, site, owner, of = address
        if (component, owner, of, name) != (member.key[0], branch, layout, OUT) or not site.startswith(
            prefix
        ):
            continue
        past = session.memory.history(address, OUT)[: nodes_of(state.entry.groups[0][0])]
        found[site.removeprefix(prefix)] = units.mixed(session, state.entry, past, state.inputs[0])
    return found
