"""What was noted of one layer along one generation: errors of every kind, and measured seconds."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.segments import REUSE, Kind


@dataclass
class Noted:
    """Errors of one layer along one generation (see `LayerTable`), and the seconds of every measured call."""

    pair: dict[Kind, np.ndarray]
    lone: dict[Kind, np.ndarray]
    share: np.ndarray
    module: np.ndarray
    shared: np.ndarray
    seconds: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    refused: dict[Candidate, str] = field(default_factory=dict[Candidate, str])

    @classmethod
    def empty(cls, menu: Sequence[Candidate], steps: int, ages: int, heads: int) -> "Noted":
        """Nothing noted yet: what is never measured cannot be chosen."""

        def blank(kind: Kind) -> np.ndarray:
            aged = kind == REUSE or (isinstance(kind, Candidate) and kind.anchored)
            return np.full((steps, ages, heads) if aged else (steps, heads), np.inf)

        kinds: list[Kind] = [REUSE, *menu]
        tables = [{kind: blank(kind) for kind in kinds} for _ in range(2)]
        rest = np.full((steps, ages), np.inf)
        return cls(tables[0], tables[1], blank(REUSE), rest.copy(), rest.copy())

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name, for a file."""
        tables = {f"{t} {_name(kind)}": a for t in ("pair", "lone") for kind, a in getattr(self, t).items()}
        seconds = {f"seconds {name}": np.array(each) for name, each in self.seconds.items()}
        refused = {
            f"refused {kind.name}": np.frombuffer(why.encode(), np.uint8)
            for kind, why in self.refused.items()
        }
        rest = {"share": self.share, "module": self.module, "shared": self.shared}
        return {**tables, **seconds, **refused, **rest}

    @classmethod
    def read(cls, arrays: Mapping[str, np.ndarray], menu: Sequence[Candidate]) -> "Noted":
        """From `arrays` of an earlier search on the same menu."""
        kinds: list[Kind] = [REUSE, *menu]
        tables = [{kind: arrays[f"{t} {_name(kind)}"] for kind in kinds} for t in ("pair", "lone")]
        seconds = {k.partition(" ")[2]: list(a) for k, a in arrays.items() if k.startswith("seconds ")}
        refused = {
            kind: arrays[f"refused {kind.name}"].tobytes().decode()
            for kind in menu if f"refused {kind.name}" in arrays
        }  # fmt: skip
        return cls(
            tables[0], tables[1], arrays["share"], arrays["module"], arrays["shared"], seconds, refused
        )

    def forbid(self) -> None:
        """Nothing may be chosen here but full attention."""
        tables = *self.pair.values(), *self.lone.values(), self.share, self.module, self.shared
        for table in tables:
            table[:] = np.inf

    def took(self, name: str, seconds: float) -> None:
        """One measured call."""
        self.seconds.setdefault(name, []).append(seconds)

    def put(self, table: dict[Kind, np.ndarray], kind: Kind, step: int, age: int, errors: np.ndarray) -> None:
        """Errors [H] of a kind."""
        table[kind][(step, age - 1) if age else step] = errors

    def scale(self, factors: np.ndarray) -> None:
        """Multiply the errors of every step by a factor [T]."""
        for tables in (self.pair, self.lone):
            for kind, errors in tables.items():
                tables[kind] = _by_step(errors, factors)
        self.share, self.module, self.shared = (
            _by_step(each, factors) for each in (self.share, self.module, self.shared)
        )

    def fill(self, known: Collection[int]) -> None:
        """Errors of candidates that were scored at the `known` steps alone, at the steps between them."""
        for table in (self.pair, self.lone):
            for kind, errors in table.items():
                if isinstance(kind, Candidate) and kind.passes_alone:
                    table[kind] = _between(errors, known, aged=kind.anchored)


def _by_step(errors: np.ndarray, factors: np.ndarray) -> np.ndarray:
    return errors * factors.reshape(-1, *[1] * (errors.ndim - 1))


def _between(errors: np.ndarray, known: Collection[int], aged: bool) -> np.ndarray:
    """[T, ...] with every step from the nearest known ones; what is older than the run stays infinite."""
    filled = errors.copy()
    for step in set(range(len(errors))) - set(known):
        before = errors[max(k for k in known if k < step)]
        after = errors[min(k for k in known if k > step)]
        with np.errstate(invalid="ignore"):
            middle = np.sqrt(before * after)
        filled[step] = np.where(np.isfinite(middle), middle, np.where(np.isfinite(after), after, before))
        if aged:
            filled[step, step:] = np.inf  # index 0 is age 1
    return filled


def _name(kind: Kind) -> str:
    return kind if isinstance(kind, str) else kind.name
