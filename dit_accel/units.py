"""Timeline sites at run time: a sublayer or a span of blocks answers, branch by branch, by computing or by a
weighted sum of stored values. A unit's value is a tuple of tensors: a module's outputs, or one residual per
stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from dit_accel.errors import MissingAnchor
from dit_accel.memory import Slot
from dit_accel.plan import Key
from dit_accel.run_report import method_name
from dit_accel.session import Session
from dit_accel.timeline import ALONE, DIFFERENCE, INPUT, OUT, SHARED, Entry, Term, Track, nodes_of, shares
from dit_accel_kernels.history_mix import history_mix

Value = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sum:
    """A weighted sum of stored tensors of one shape; empty, it is zero."""

    terms: tuple[tuple[float, Tensor, Tensor | None], ...] = ()  # weight, value, scale of its rows

    @property
    def shape(self) -> Size | None:
        return self.terms[0][1].shape if self.terms else None

    def value(self, like: Tensor) -> Tensor:
        """The sum by itself in a tensor of its own; where it is empty zeros like `like`.

        What was stored in 8 bits comes back in the dtype of `like`.
        """
        if not self.terms:
            return torch.zeros_like(like)
        coded = all(scale is not None for _, _, scale in self.terms)
        return self._mix(None, like.dtype if coded else None)

    def added_to(self, x: Tensor) -> Tensor:
        """x plus the sum."""
        return self._mix(x, x.dtype) if self.terms else x

    def _mix(self, x: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        weights, values, scales = zip(*self.terms, strict=True)
        return history_mix(values, weights, x=x, scales=scales, dtype=dtype)


Answer = tuple[Sum, ...]  # one for each stream or output


def decide(
    session: Session, key: Key, track: Track, branch: str, shapes: Sequence[Size], cond_pending: bool = False
) -> tuple[Entry, Answer | None]:
    """The entry of this visit and, where it is not computed, what answers; counts the visit.

    `cond_pending`: cond is being answered at this very visit (a batched pair in a span), so a shared value
    can only be derived later, by `derive`; the answer given back is then empty. `shapes` are those of the
    visit's streams: text of another length cannot be copied from cond.
    """
    assert session.at is not None
    entry = track.entry(session.at.step, branch)
    method = entry.groups[0][0]
    answer, letters = None, entry.letters
    if not entry.computes:
        try:
            if cond_pending and shares(method):
                _foresee(session, key, branch, entry)
                answer = ()
            else:
                answer = derive(session, key, branch, entry)
            _fits(answer, shapes)
        except MissingAnchor as reason:
            session.fallback(f"computed where {method_name(method)} was planned: {reason}", key[1])
            answer, letters, method = None, ALONE, None
    if answer is not None:
        session.work.skip(key, branch)
    session.count(key, branch, letters, {method if answer is not None else None: 1}, computed="compute")
    return entry, answer


def _fits(answer: Answer, shapes: Sequence[Size]) -> None:
    for stored, wanted in zip(answer, shapes, strict=False):
        if stored.shape is not None and stored.shape != wanted:
            raise MissingAnchor(f"what is stored has shape {tuple(stored.shape)}, this call {tuple(wanted)}")


def keep(
    session: Session, key: Key, track: Track, branch: str, value: Sequence[Tensor], planned: bool,
    names: tuple[str, ...] = (OUT, SHARED, DIFFERENCE),
) -> None:  # fmt: skip
    """Store under `names` what later steps read of a value; an unplanned computation stores all."""
    for name in kept(session, track, branch, planned, names):
        assert session.at is not None
        stored = _difference(session, key, value) if name == DIFFERENCE else tuple(value)
        if stored is not None:
            owner = "cond" if branch == "both" else branch
            session.memory.store(
                session.address(key, branch), name, stored, session.at.step, track.depths[owner, name]
            )


def kept(
    session: Session,
    track: Track,
    branch: str,
    planned: bool,
    names: Sequence[str] = (OUT, SHARED, DIFFERENCE),
) -> list[str]:
    """The names under which the value of this visit is stored."""
    assert session.at is not None
    entry = track.entry(session.at.step, branch)
    owner = "cond" if branch == "both" else branch
    return [n for n in names if (owner, n) in track.slots and (n in entry.keep or not planned)]


def derive(session: Session, key: Key, branch: str, entry: Entry) -> Answer:
    """What answers instead of a computation; MissingAnchor if what it reads is missing or too old."""
    method = entry.groups[0][0]
    if entry.terms:
        return _summed(session, key, branch, entry)
    if shares(method):
        return _from_cond(session, key, branch, entry)
    if nodes_of(method) == 0:
        return (Sum(), Sum())  # as many as any unit has
    past = _history(session, key, branch, OUT, entry)
    return tuple(Sum(_terms(past, i)) for i in range(len(past[0][1].tensors)))


def _summed(session: Session, key: Key, branch: str, entry: Entry) -> Answer:
    """A fitted answer: named values of either branch, by their steps."""
    # an input is shaped as outputs are, so these come first
    terms = sorted(entry.terms, key=lambda term: term.of == INPUT)
    past = [(term, _stored_at(session, key, branch, term)) for term in terms]
    like = past[0][1].tensors
    return tuple(Sum(tuple(_addend(*each, i, like[i].shape) for each in past)) for i in range(len(like)))


def _addend(term: Term, slot: Slot, index: int, like: Size) -> tuple[float, Tensor, Tensor | None]:
    tensor, scale = slot.tensors[index], scale_of(slot, index)
    if term.of == INPUT:
        tensor, scale = _shaped(tensor, scale, like)
    if tensor.shape != like:  # text, which may be of another length on the other branch
        raise MissingAnchor(
            f"{term.of} has shape {tuple(tensor.shape)} at step {term.step}, not {tuple(like)}"
        )
    return term.weight, tensor, scale


def _stored_at(session: Session, key: Key, branch: str, term: Term) -> Slot:
    """The value of one term; MissingAnchor where it is gone."""
    owner = branch if term.of == INPUT else term.of
    name = INPUT if term.of == INPUT else OUT
    slots = session.memory.history(session.address(key, owner), name)
    slot = next((slot for slot in slots if slot.step == term.step), None)
    if slot is None:
        raise MissingAnchor(f"no {name} of the {owner} branch from step {term.step}")
    return _near(session, slot)


def _shaped(tensor: Tensor, scale: Tensor | None, like: Size) -> tuple[Tensor, Tensor | None]:
    """A denoiser's input in the shape of its output.

    They differ in channels: a learned variance follows the prediction, condition frames follow the latents.
    """
    for axis, wanted in enumerate(like):
        have = tensor.shape[axis]
        parts = [tensor] if scale is None else [tensor, scale]
        if have > wanted:
            parts = [part.narrow(axis, 0, wanted) for part in parts]
        elif have < wanted:
            pad = [list(part.shape) for part in parts]
            for shape in pad:
                shape[axis] = wanted - have
            parts = [torch.cat([p, p.new_zeros(shape)], axis) for p, shape in zip(parts, pad, strict=True)]
        tensor, scale = parts[0], parts[1] if scale is not None else None
    return tensor, scale


def _from_cond(session: Session, key: Key, branch: str, entry: Entry) -> Answer:
    """cond's value of this step plus the last difference between the branches, or its continuation."""
    shared = recall(session, key, "cond", SHARED, max_age=0)
    first = tuple((1.0, tensor, scale_of(shared, i)) for i, tensor in enumerate(shared.tensors))
    if not entry.groups[0][0].difference:
        return tuple(Sum((term,)) for term in first)
    past = _history(session, key, branch, DIFFERENCE, entry)
    sums = []
    for i, term in enumerate(first):
        terms = _terms(past, i)
        # a stream whose length differs between the branches (text) keeps uncond's own value
        sums.append(Sum((term, *terms) if terms[0][1].shape == term[1].shape else terms))
    return tuple(sums)


def _history(session: Session, key: Key, branch: str, name: str, entry: Entry) -> list[tuple[float, Slot]]:
    """The stored values that answer, newest first, with their weights."""
    assert session.at is not None
    method = entry.groups[0][0]
    past = session.memory.history(session.address(key, branch), name)[: nodes_of(method)]
    check_age(past[0] if past else None, session.at.step, branch, name, method.max_age)
    return list(zip(weights_of(session, entry, past), (_near(session, slot) for slot in past), strict=True))


def mixed(session: Session, entry: Entry, past: Sequence[Slot], like: Tensor) -> Value:
    """The weighted sums of several steps' values, newest first; a lone one is given as it is stored."""
    near = [_near(session, slot) for slot in past]
    weights = weights_of(session, entry, past)
    if tuple(weights) == (1.0,) and not any(scale is not None for scale in near[0].scales):
        return near[0].tensors
    weighted = list(zip(weights, near, strict=True))
    return tuple(Sum(_terms(weighted, i)).value(like) for i in range(len(near[0].tensors)))


def weights_of(session: Session, entry: Entry, past: Sequence[Slot]) -> Sequence[float]:
    """The weights of the method's rule for the steps that are stored, newest first."""
    assert session.at is not None
    steps = [slot.step for slot in past]
    method = entry.groups[0][0]
    levels = session.tracker.levels
    if not hasattr(method, "weights"):  # a registered method that only knows the newest value
        return (1.0, *(0.0,) * (len(past) - 1))
    return method.weights(levels[session.at.step], [levels[step] for step in steps])


def _terms(past: Sequence[tuple[float, Slot]], index: int) -> tuple[tuple[float, Tensor, Tensor | None], ...]:
    return tuple((weight, slot.tensors[index], scale_of(slot, index)) for weight, slot in past)


def scale_of(slot: Slot, index: int) -> Tensor | None:
    return slot.scales[index] if slot.scales else None


def _near(session: Session, slot: Slot) -> Slot:
    """The slot on the device that runs."""
    return slot if session.device is None else slot.on(session.device)


def _foresee(session: Session, key: Key, branch: str, entry: Entry) -> None:
    """Check what can be checked before cond's value is there."""
    if entry.groups[0][0].difference:
        _history(session, key, branch, DIFFERENCE, entry)


def _difference(session: Session, key: Key, value: Sequence[Tensor]) -> Value | None:
    try:
        shared = recall(session, key, "cond", SHARED, max_age=0)
    except MissingAnchor:
        return None  # cond was not computed at this step
    own = [Sum(((1.0, c, scale_of(shared, i)),)) for i, c in enumerate(shared.tensors)]
    return tuple(u - c.value(u) if u.shape == c.shape else u for u, c in zip(value, own, strict=True))


def recall(session: Session, key: Key, branch: str, name: str, max_age: int) -> Slot:
    """The newest stored value, at most `max_age` steps old; MissingAnchor otherwise."""
    assert session.at is not None
    past = session.memory.history(session.address(key, branch), name)
    newest = past[0] if past else None
    check_age(newest, session.at.step, branch, name, max_age)
    assert newest is not None
    return _near(session, newest)


def check_age(slot: Slot | None, step: int, branch: str, name: str, max_age: int) -> None:
    """MissingAnchor unless there is a value of an age from 0 to `max_age`."""
    age = None if slot is None else step - slot.step
    if age is None or not 0 <= age <= max_age:
        raise MissingAnchor(f"no {name} of the {branch} branch at most {max_age} steps old (age {age})")


def halve(
    args: Any, kwargs: Mapping[str, Any], batch: int, index: int, unbatched: tuple[str, ...] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The uncond (0) or cond (1) half of every argument that has the batch as its first axis."""

    def half(value: Any) -> Any:
        paired = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value.chunk(2)[index] if paired else value

    return tuple(half(x) for x in args), {k: v if k in unbatched else half(v) for k, v in kwargs.items()}


def visit(session: Session, key: Key, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The output of a sublayer's module: computed by `run`, or what answers for it."""
    track, at = session.track("timeline", key), session.at
    if track is None or at is None:
        return run(*args, **kwargs)
    if at.branch != "both" or track.together:
        return answer(session, key, at.branch, run, args, kwargs)
    out = []
    for index, branch in ((1, "cond"), (0, "uncond")):  # cond first: uncond may read what it stores
        half = halve(args, kwargs, at.batch, index)
        with session.only(branch):
            out.append(answer(session, key, branch, run, *half))
    if isinstance(out[0], Tensor):
        return torch.cat([out[1], out[0]])
    return tuple(torch.cat([u, c]) for u, c in zip(out[1], out[0], strict=True))


def answer(session: Session, key: Key, branch: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The output of a sublayer's module on one branch: computed by `run`, or a sum of stored ones."""
    track = session.track("timeline", key)
    assert track is not None
    streams = [*args[:2], kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
    streams = [x for x in streams if isinstance(x, Tensor)]
    entry, found = decide(session, key, track, branch, [x.shape for x in streams])
    if found is None:
        out = run(*args, **kwargs)
        keep(session, key, track, branch, as_tuple(out), planned=entry.computes)
        return out
    value = tuple(
        each.value(like) for each, like in zip(found[: _outputs(session, key)], streams, strict=False)
    )
    keep(session, key, track, branch, value, planned=True)
    return value[0] if len(value) == 1 else value


def _outputs(session: Session, key: Key) -> int:
    """How many tensors a sublayer gives out, each shaped as one of its streams: a joint attention two."""
    assert session.at is not None
    return 2 if session.at.joint and key[1] in session.denoisers[key[0]].self_attention else 1


def as_tuple(output: Any) -> Value:
    """What a module gives out as a tuple of tensors."""
    return (output,) if isinstance(output, Tensor) else tuple(output)
