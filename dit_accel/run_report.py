"""What a run did: counters, the timeline as it really went, memory, and a sentence for every fallback."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One site on one branch: per step a string of letters, one per head ("" where it was not visited)."""

    site: str
    branch: str
    planned: tuple[str, ...]
    ran: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """The last run of an accelerated pipeline."""

    recipe: str
    family: str
    steps: int
    runs: int
    counters: dict[str, int]  # method -> visits; a head of an attention site counts one
    rows: tuple[Row, ...]
    legend: dict[str, str]
    notes: tuple[str, ...]
    memory_bytes: int  # the most held at any time in the last run
    predicted_bytes: int
    levels: tuple[float, ...]
    expects_work: bool  # whether the recipe asks for anything but the model's own computation
    attention_kept: float | None  # pairs of query and key computed, over those of dense self-attention
    # rows and bytes of exact tables by name, and the reason where a kind of table was not made
    exact: dict[str, int | str] = field(default_factory=dict[str, int | str])

    @property
    def did_something(self) -> bool:
        """Whether anything ran otherwise than in the plain pipeline."""
        return any(count for name, count in self.counters.items() if name not in ("full", "compute"))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {**asdict(self), "did_something": self.did_something}

    def __str__(self) -> str:
        head = f"dit_accel: {self.recipe} on {self.family}, {self.steps} steps, run {self.runs}"
        counts = (
            ", ".join(f"{name} {count}" for name, count in sorted(self.counters.items())) or "nothing ran"
        )
        memory = (
            f"memory {self.memory_bytes / 2**20:.1f} MiB (predicted {self.predicted_bytes / 2**20:.1f} MiB)"
        )
        lines = [head, f"  {counts}", f"  {memory}"]
        if self.attention_kept is not None:
            lines.append(f"  attention kept: {self.attention_kept:.1%} of its work")
        if self.exact:
            lines.append("  exact tables: " + ", ".join(f"{n} {count}" for n, count in self.exact.items()))
        lines += [
            f"  {row.site:<28} {row.branch:<7} {' '.join(x or '-' for x in row.ran)}" for row in self.rows
        ]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def method_name(method: Any) -> str:
    """The word a recipe uses for a method object, or what it says itself that it is counted as."""
    counted_as = getattr(method, "counted_as", None)
    if counted_as:
        return counted_as
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(method).__name__)
    return words.lstrip("_")


def merge(counters: dict[tuple[str, str], int]) -> dict[str, int]:
    """Sum counters keyed by (site, method) over the sites."""
    total: Counter[str] = Counter()
    for (_, name), count in counters.items():
        total[name] += count
    return dict(total)
