"""Timeline sites at run time: a sublayer or a span of blocks answers, branch by branch, by computing,
reusing or sharing. A unit's value is a tuple of tensors: a module's outputs, or one residual per stream."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Size, Tensor

from dit_accel.errors import MissingAnchor
from dit_accel.plan import Key
from dit_accel.run_report import method_name
from dit_accel.session import Session
from dit_accel.timeline import ALONE, DIFFERENCE, OUT, SHARED, Entry, Track

Value = tuple[Tensor, ...]


def decide(
    session: Session, key: Key, track: Track, branch: str, shapes: Sequence[Size], cond_pending: bool = False
) -> tuple[Entry, Value | None]:
    """The entry of this visit and, where it is not computed, the value that answers; counts the visit.

    `cond_pending`: cond is being answered at this very visit (a batched pair in a span), so a shared value
    can only be derived later, by `derive`; the value given back is then empty. `shapes` are those of the
    visit's streams: text of another length cannot be copied from cond.
    """
    assert session.at is not None
    entry = track.entry(session.at.step, branch)
    method = entry.groups[0][0]
    value, letters = None, entry.letters
    if not entry.computes:
        try:
            value = (
                _foresee(session, key, branch, method)
                if cond_pending
                else derive(session, key, branch, method)
            )
            _fits(value, shapes)
        except MissingAnchor as reason:
            session.fallback(f"computed where {method_name(method)} was planned: {reason}", key[1])
            value, letters, method = None, ALONE, None
    if value is not None:
        session.work.skip(key, branch)
    session.count(key, branch, letters, {method if value is not None else None: 1}, computed="compute")
    return entry, value


def _fits(value: Value, shapes: Sequence[Size]) -> None:
    for stored, wanted in zip(value, shapes, strict=False):
        if stored.shape != wanted:
            raise MissingAnchor(f"what is stored has shape {tuple(stored.shape)}, this call {tuple(wanted)}")


def keep(
    session: Session, key: Key, track: Track, branch: str, value: Sequence[Tensor], planned: bool,
    names: tuple[str, ...] = (OUT, SHARED, DIFFERENCE),
) -> None:  # fmt: skip
    """Store under `names` what later steps read of a computed value; an unplanned one stores all."""
    assert session.at is not None
    step = session.at.step
    entry = track.entry(step, branch)
    owner = "cond" if branch == "both" else branch
    for name in names:
        if (owner, name) not in track.slots or (planned and name not in entry.keep):
            continue
        stored = _difference(session, key, value) if name == DIFFERENCE else tuple(value)
        if stored is not None:
            session.memory.store(session.address(key, branch), name, stored, step)


def derive(session: Session, key: Key, branch: str, method: Any) -> Value:
    """The value of a reuse or a share; MissingAnchor if what it reads is missing or too old."""
    if not hasattr(method, "difference"):
        return recall(session, key, branch, OUT, method.max_age)
    shared = recall(session, key, "cond", SHARED, max_age=0)
    if not method.difference:
        return shared
    own = recall(session, key, branch, DIFFERENCE, method.max_age)
    # a stream whose length differs between the branches (text) keeps uncond's own value
    return tuple(c + d if c.shape == d.shape else d for c, d in zip(shared, own, strict=True))


def _foresee(session: Session, key: Key, branch: str, method: Any) -> Value:
    """Check what can be checked before cond's value is there."""
    if not hasattr(method, "difference"):
        return derive(session, key, branch, method)
    if method.difference:
        recall(session, key, branch, DIFFERENCE, method.max_age)
    return ()


def _difference(session: Session, key: Key, value: Sequence[Tensor]) -> Value | None:
    try:
        shared = recall(session, key, "cond", SHARED, max_age=0)
    except MissingAnchor:
        return None  # cond was not computed at this step
    return tuple(u - c if u.shape == c.shape else u for u, c in zip(value, shared, strict=True))


def recall(session: Session, key: Key, branch: str, name: str, max_age: int) -> Value:
    """A stored value at most `max_age` steps old; MissingAnchor otherwise."""
    assert session.at is not None
    slot = session.memory.recall(session.address(key, branch), name)
    age = None if slot is None else session.at.step - slot.made_at[0]
    if slot is None or age is None or not 0 <= age <= max_age:
        raise MissingAnchor(f"no {name} of the {branch} branch at most {max_age} steps old (age {age})")
    return slot.tensors


def halve(
    args: Any, kwargs: Mapping[str, Any], batch: int, index: int, unbatched: tuple[str, ...] = ()
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The uncond (0) or cond (1) half of every argument that has the batch as its first axis."""

    def half(value: Any) -> Any:
        paired = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch
        return value.chunk(2)[index] if paired else value

    return tuple(half(x) for x in args), {k: v if k in unbatched else half(v) for k, v in kwargs.items()}


def answer(session: Session, key: Key, branch: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The output of a sublayer's module on one branch: computed by `run`, or stored."""
    track = session.track("timeline", key)
    assert track is not None
    streams = [*args[:2], kwargs.get("hidden_states"), kwargs.get("encoder_hidden_states")]
    shapes = [x.shape for x in streams if isinstance(x, Tensor)]
    entry, value = decide(session, key, track, branch, shapes)
    if value is None:
        out = run(*args, **kwargs)
        keep(session, key, track, branch, as_tuple(out), planned=entry.computes)
        return out
    keep(session, key, track, branch, value, planned=True)
    # copies: a caller may add to them in place
    return value[0].clone() if len(value) == 1 else tuple(x.clone() for x in value)


def as_tuple(output: Any) -> Value:
    """What a module gives out as a tuple of tensors."""
    return (output,) if isinstance(output, Tensor) else tuple(output)
