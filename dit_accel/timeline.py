"""What may follow what: lays the letters of one site over the steps and decides what must be kept.

Rules (steps k, branches cond before uncond):
    reuse needs an output computed on its own branch at most max_age steps before;
    share needs cond's answer of the same step, computed or reused, and, with `difference`, a difference at
    most max_age steps old, stored at a step at which both branches computed; cond itself never shares;
    tail and residual need what is far, stored by an anchor: a full pass of the same choice on the same head
    and branch at most max_age steps before.
In [attention] an entry that breaks a rule computes: that is how an interval of `reuse` refreshes itself, and
where `tail` and `residual` make their anchors. A `full` entry makes none: it stays the pipeline's own call.
In [timeline] the letters are explicit, so there it is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dit_accel.errors import RecipeError

BRANCHES = ("cond", "uncond")
Runs = Mapping[str, frozenset[int]]  # branch -> steps
FEW_STEPS = 8  # at or under this a step is too long for its neighbour's outputs

OUT, SHARED, DIFFERENCE = "out", "shared", "difference"
TAIL, TAIL_LSE, RESIDUAL = "tail", "tail_lse", "residual"  # what an anchor stores itself
ALONE = "."  # the letter of what a recipe leaves to the model, and of entries that had to compute


@dataclass(frozen=True)
class Entry:
    """One site at one step on one branch. Heads are grouped by method; a span or sublayer has one "head"."""

    letters: str
    groups: tuple[tuple[Any, tuple[int, ...]], ...]  # (method or None for the model's own, heads)
    keep: Mapping[str, tuple[int, ...]]  # name -> heads whose value must be stored after computing

    @property
    def computes(self) -> bool:
        """For a span or sublayer: whether the model runs."""
        method = self.groups[0][0]
        return method is None or method.computes

    @property
    def approximates(self) -> bool:
        return any(method is not None and not method.exact for method, _ in self.groups)


@dataclass(frozen=True)
class Track:
    """One site over all steps."""

    entries: Mapping[str, tuple[Entry, ...]]
    upgraded: int  # entries that compute although their letter says reuse or share

    def entry(self, step: int, branch: str) -> Entry:
        """The entry of a step; branch "both" is only asked where `together` holds."""
        return self.entries["cond" if branch == "both" else branch][step]

    @property
    def branches(self) -> tuple[str, ...]:
        return ("both",) if self.together else BRANCHES

    @cached_property
    def together(self) -> bool:
        """Both branches do the same at every step, so a batched pair can be handled in one go.

        So it is where nothing is approximated: halves of a batch round differently from the whole.
        """
        return not self.approximates or self.entries["cond"] == self.entries["uncond"]

    @cached_property
    def approximates(self) -> bool:
        return any(entry.approximates for entries in self.entries.values() for entry in entries)

    @cached_property
    def slots(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(branch, name) -> the heads ever stored under that name."""
        found: dict[tuple[str, str], set[int]] = {}
        for branch in BRANCHES:
            for entry in self.entries[branch]:
                for name, heads in entry.keep.items():
                    found.setdefault((branch, name), set()).update(heads)
        return {key: tuple(sorted(heads)) for key, heads in found.items()}


def lay(
    letters: Mapping[str, tuple[str, ...]],  # branch -> one string per step, one letter per head
    method_of: Callable[[str], Any],
    strict: str | None,  # where the letters stand in the recipe, if breaking a rule is an error
    few: bool,
    runs: Runs | None = None,  # branch -> the steps at which the site is reached at all; None is every one
) -> Track:
    """Lay every head of one site over the steps."""
    heads = len(letters["cond"][0])
    lanes = [
        _Lane({b: "".join(text[head] for text in letters[b]) for b in BRANCHES}, method_of, strict, few, runs)
        for head in range(heads)
    ]
    all_steps = range(len(letters["cond"]))
    entries = {b: tuple(_entry([lane.cell(k, b) for lane in lanes]) for k in all_steps) for b in BRANCHES}
    return Track(entries, sum(lane.upgraded for lane in lanes))


def _entry(cells: "list[tuple[str, Any, frozenset[str]]]") -> Entry:
    groups: dict[Any, list[int]] = {}
    keep: dict[str, list[int]] = {}
    for head, (_, method, names) in enumerate(cells):
        groups.setdefault(method, []).append(head)
        for name in sorted(names):
            keep.setdefault(name, []).append(head)
    return Entry(
        letters="".join(letter for letter, _, _ in cells),
        groups=tuple((method, tuple(heads)) for method, heads in groups.items()),
        keep={name: tuple(heads) for name, heads in keep.items()},
    )


class _Lane:
    """One head of one site: a forward pass decides what runs, a backward look what must be kept."""

    def __init__(
        self, letters: Mapping[str, str], method_of: Any, strict: str | None, few: bool, runs: Runs | None
    ):
        self.strict, self.few, self.upgraded, self.runs = strict, few, 0, runs
        self.last_out: dict[str, int] = {}
        self.last_difference: int | None = None
        self.last_anchor: dict[str, tuple[int, Any]] = {}  # branch -> (step, the method it is for)
        self.rows: dict[str, list[tuple[str, Any]]] = {b: [] for b in BRANCHES}
        for step in range(len(letters["cond"])):
            for branch in BRANCHES:
                letter = letters[branch][step]
                self.rows[branch].append(self._decide(letter, method_of(letter), step, branch))
                if self._computed(step, branch):
                    self.last_out[branch] = step
            if self._computed(step, "cond") and self._computed(step, "uncond"):
                self.last_difference = step
        self.steps = len(self.rows["cond"])

    def _decide(self, letter: str, method: Any, step: int, branch: str) -> tuple[str, Any]:
        if hasattr(method, "anchor"):
            return self._complete(letter, method, step, branch)
        if method is None or method.computes:
            return letter, method
        shares = hasattr(method, "difference")
        absent = self.runs is not None and step not in self.runs[branch]
        if absent or (shares and branch == "cond"):
            return ALONE, None
        reason = "steps are few" if self.few else self._why_not(method, shares, step, branch)
        if reason is None:
            return letter, method
        if self.strict is not None:
            raise RecipeError(
                f'{self.strict}: step {step} ({branch}) is "{letter}", but {reason}. '
                f"Compute at this step or one shortly before, or raise the choice's max_age."
            )
        self.upgraded += 1
        return ALONE, None

    def _complete(self, letter: str, method: Any, step: int, branch: str) -> tuple[str, Any]:
        """A method that completes what an anchor stored; where that is missing or too old, an anchor."""
        absent = self.runs is not None and step not in self.runs[branch]
        if absent or self.few or method.max_age == 0:
            return ALONE, None
        made, of = self.last_anchor.get(branch, (step, None))
        if of == method and step - made <= method.max_age:
            return letter, method
        self.last_anchor[branch] = step, method.anchor.anchors  # never a choice that only refreshes
        return ALONE, method.anchor

    def _why_not(self, method: Any, shares: bool, step: int, branch: str) -> str | None:
        if method.max_age == 0:
            return "its max_age is 0"
        if shares and not method.difference:
            return None
        last = self.last_difference if shares else self.last_out.get(branch)
        if last is None:
            return "nothing was computed before it"
        return None if step - last <= method.max_age else f"the stored value is {step - last} steps old"

    def _computed(self, step: int, branch: str) -> bool:
        if self.runs is not None and step not in self.runs[branch]:
            return False
        _, method = self.rows[branch][step]
        return method is None or method.computes

    def cell(self, step: int, branch: str) -> tuple[str, Any, frozenset[str]]:
        """(letter, method, names to keep) of one step."""
        letter, method = self.rows[branch][step]
        names = self._keeps(step, branch)
        if hasattr(method, "anchors"):
            if not self._is_read(method.anchors, step, branch):
                return letter, None, frozenset(names)  # nobody completes it: the model's own call is enough
            names += method.keeps
        return letter, method, frozenset(names)

    def _is_read(self, method: Any, step: int, branch: str) -> bool:
        """Whether `method` runs after its anchor at this step and before the next anchor."""
        for later in range(step + 1, self.steps):
            other = self.rows[branch][later][1]
            if other == method:
                return True
            if hasattr(other, "anchors"):
                return False
        return False

    def _keeps(self, step: int, branch: str) -> list[str]:
        if not self._computed(step, branch):
            # a reused output of cond can still be shared
            return [SHARED] if branch == "cond" and self._shares(step) else []
        names = [OUT] if self._read_later(step, branch, shared=False) else []
        stores_difference = self._stores_difference(step)
        if branch == "uncond" and stores_difference:
            names.append(DIFFERENCE)
        if branch == "cond" and (stores_difference or self._shares(step)):
            names.append(SHARED)
        return names

    def _stores_difference(self, step: int) -> bool:
        both = self._computed(step, "cond") and self._computed(step, "uncond")
        return both and self._read_later(step, "uncond", shared=True)

    def _shares(self, step: int) -> bool:
        return hasattr(self.rows["uncond"][step][1], "difference")

    def _read_later(self, step: int, branch: str, shared: bool) -> bool:
        """Whether a later step reads what this one computes, before it is computed anew."""
        for later in range(step + 1, self.steps):
            method = self.rows[branch][later][1]
            if self._computed(later, branch):
                if not shared or self._computed(later, "cond"):
                    return False
            elif (
                method is not None
                and not method.computes
                and hasattr(method, "difference") == shared
                and getattr(method, "difference", True)
            ):
                return True
        return False
