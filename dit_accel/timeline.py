"""What may follow what: lays the letters of one site over the steps and decides what must be kept.

Rules (steps k, branches cond before uncond):
    reuse needs an output computed on its own branch at most max_age steps before; forecast too, and continues
    the last order + 1 of them (fewer where fewer were computed); skip needs nothing;
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

OUT, SHARED, DIFFERENCE, INPUT = "out", "shared", "difference", "input"
TAIL, TAIL_LSE, RESIDUAL = "tail", "tail_lse", "residual"  # what an anchor stores itself
ALONE = "."  # the letter of what a recipe leaves to the model, and of entries that had to compute


@dataclass(frozen=True)
class Term:
    """A stored value with its weight in a sum."""

    of: str  # "cond", "uncond" (a site's value on that branch) or "input" (what the denoiser was called with)
    step: int
    weight: float


Terms = tuple[Term, ...]


@dataclass(frozen=True)
class Entry:
    """One site at one step on one branch. Heads are grouped by method; a span or sublayer has one "head"."""

    letters: str
    groups: tuple[tuple[Any, tuple[int, ...]], ...]  # (method or None for the model's own, heads)
    keep: Mapping[str, tuple[int, ...]]  # name -> heads whose value must be stored after computing
    # where a span or sublayer does not compute: the steps whose stored values it reads, newest first,
    sources: tuple[int, ...] = ()
    terms: "Terms" = ()  # or, if it is fitted, the named values it sums up

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

    @cached_property
    def depths(self) -> dict[tuple[str, str], int]:
        """(branch, name) -> how many steps' values are held at a time."""
        # (branch, name, step) -> the first step whose store this value need not outlive
        end: dict[tuple[str, str, int], int] = {}
        for branch in BRANCHES:
            for step, entry in enumerate(self.entries[branch]):
                name = DIFFERENCE if any(shares(method) for method, _ in entry.groups) else OUT
                read = dict.fromkeys(((branch, name, source) for source in entry.sources), step)
                # the input of this step, and cond's value for uncond, are stored before a sum reads
                read |= {(branch, INPUT, t.step): step + 1 for t in entry.terms if t.of == INPUT}
                read |= {(t.of, OUT, t.step): step + (t.of != branch) for t in entry.terms if t.of != INPUT}
                end |= {key: max(free, end.get(key, 0)) for key, free in read.items()}
        return {key: self._depth(*key, end) for key in self.slots}

    def _depth(self, branch: str, name: str, end: Mapping[tuple[str, str, int], int]) -> int:
        """How many values are stored from any one on until nothing reads it any more, at most."""
        stored = [step for step, entry in enumerate(self.entries[branch]) if name in entry.keep]
        reach = [(step, end.get((branch, name, step), step + 1)) for step in stored]
        return max((sum(first <= step < free for step in stored) for first, free in reach), default=1)

    @property
    def branches(self) -> tuple[str, ...]:
        return ("both",) if self.together else BRANCHES

    @cached_property
    def together(self) -> bool:
        """Both branches do the same at every step, so a batched pair can be handled in one go.

        So it is where nothing is approximated: halves of a batch round differently from the whole. A fitted
        answer is never so: its terms name the value of one branch, whichever answers.
        """
        alike = self.entries["cond"] == self.entries["uncond"]
        return not self.approximates or (alike and not any(entry.terms for entry in self.entries["cond"]))

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


def shares(method: Any) -> bool:
    """Whether a method derives uncond from cond."""
    return hasattr(method, "difference")


def nodes_of(method: Any) -> int:
    """How many stored values (of different steps) a method that does not compute reads."""
    return 0 if method is None or method.computes else getattr(method, "nodes", 1)


def lay(
    letters: Mapping[str, tuple[str, ...]],  # branch -> one string per step, one letter per head
    method_of: Callable[[str], Any],
    strict: str | None,  # where the letters stand in the recipe, if breaking a rule is an error
    few: bool,
    runs: Runs | None = None,  # branch -> the steps at which the site is reached at all; None is every one
    fitted: Mapping[str, Mapping[int, Terms]] | None = None,  # branch -> step -> what a fitted answer sums
) -> Track:
    """Lay every head of one site over the steps."""
    heads = len(letters["cond"][0])
    lanes = [
        _Lane(
            {b: "".join(text[head] for text in letters[b]) for b in BRANCHES},
            method_of,
            strict,
            few,
            runs,
            fitted or {},
        )
        for head in range(heads)
    ]
    all_steps = range(len(letters["cond"]))
    entries = {
        b: tuple(
            _entry([lane.cell(k, b) for lane in lanes], lanes[0].sources[b][k], lanes[0].terms(k, b))
            for k in all_steps
        )
        for b in BRANCHES
    }
    return Track(entries, sum(lane.upgraded for lane in lanes))


def _entry(cells: "list[tuple[str, Any, frozenset[str]]]", sources: tuple[int, ...], terms: Terms) -> Entry:
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
        sources=sources,
        terms=terms,
    )


class _Lane:
    """One head of one site: a forward pass decides what runs, a backward look what must be kept."""

    def __init__(
        self, letters: Mapping[str, str], method_of: Any, strict: str | None, few: bool, runs: Runs | None,
        fitted: Mapping[str, Mapping[int, Terms]],
    ):  # fmt: skip
        self.strict, self.few, self.upgraded, self.runs, self.fitted = strict, few, 0, runs, fitted
        self.computed: dict[str, list[int]] = {b: [] for b in BRANCHES}  # steps, oldest first
        self.differences: list[int] = []  # steps at which both branches computed
        self.sources: dict[str, list[tuple[int, ...]]] = {b: [] for b in BRANCHES}
        self.last_anchor: dict[str, tuple[int, Any]] = {}  # branch -> (step, the method it is for)
        self.rows: dict[str, list[tuple[str, Any]]] = {b: [] for b in BRANCHES}
        for step in range(len(letters["cond"])):
            for branch in BRANCHES:
                letter = letters[branch][step]
                self.rows[branch].append(self._decide(letter, method_of(letter), step, branch))
                self.sources[branch].append(self._read(step, branch))
                if self._computed(step, branch):
                    self.computed[branch].append(step)
            if self._computed(step, "cond") and self._computed(step, "uncond"):
                self.differences.append(step)
        self.steps = len(self.rows["cond"])
        self.deepest = max(nodes_of(method) for row in self.rows.values() for _, method in row)

    def _decide(self, letter: str, method: Any, step: int, branch: str) -> tuple[str, Any]:
        if hasattr(method, "anchor"):
            return self._complete(letter, method, step, branch)
        if method is None or method.computes:
            return letter, method
        if hasattr(method, "otherwise") and not self._weighted(step, branch):
            method = method.otherwise  # no weights fit this schedule
        absent = self.runs is not None and step not in self.runs[branch]
        if absent or (shares(method) and branch == "cond"):
            return ALONE, None
        reason = "steps are few" if self.few else self._why_not(method, step, branch)
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

    def _why_not(self, method: Any, step: int, branch: str) -> str | None:
        if getattr(method, "max_age", None) == 0:
            return "its max_age is 0"
        if hasattr(method, "otherwise"):
            lost = [term for term in self._weighted(step, branch) if not self._is_there(term, step)]
            return f"{lost[0].of} was not computed at step {lost[0].step}" if lost else None
        if nodes_of(method) == 0:
            return None
        made = self._made(method, branch)
        if not made:
            return "nothing was computed before it"
        age = step - made[-1]
        return None if age <= method.max_age else f"the stored value is {age} steps old"

    def _weighted(self, step: int, branch: str) -> Terms:
        """What the recipe's weights sum up at this step."""
        return self.fitted.get(branch, {}).get(step, ())

    def _is_there(self, term: Term, step: int) -> bool:
        return term.step <= step if term.of == INPUT else term.step in self.computed[term.of]

    def terms(self, step: int, branch: str) -> Terms:
        """What a fitted answer sums up; () where something else answers."""
        return self._weighted(step, branch) if hasattr(self.rows[branch][step][1], "otherwise") else ()

    def _sums(self, of: str, step: int, reader: str = "") -> bool:
        """Whether a fitted answer (of one branch, or of any) reads a value of this step, now or later."""
        return any(
            (term.of, term.step) == (of, step)
            for branch in ((reader,) if reader else BRANCHES)
            for later in range(step, self.steps if self.fitted else 0)
            for term in self.terms(later, branch)
        )

    def _made(self, method: Any, branch: str) -> list[int]:
        """The steps so far whose values a method could read, oldest first."""
        return self.differences if shares(method) else self.computed[branch]

    def _read(self, step: int, branch: str) -> tuple[int, ...]:
        """The steps whose values this step reads, newest first."""
        _, method = self.rows[branch][step]
        count = nodes_of(method)
        return tuple(reversed(self._made(method, branch)[-count:])) if count else ()

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
        inputs = [INPUT] if self._sums(INPUT, step, branch) else []
        return inputs + self._keeps_values(step, branch)

    def _keeps_values(self, step: int, branch: str) -> list[str]:
        if not self._computed(step, branch):
            # a reused output of cond can still be shared
            return [SHARED] if branch == "cond" and self._shares(step) else []
        used = self._is_used(step, branch, OUT) or self._sums(branch, step)
        names = [OUT] if used else []
        stores_difference = self._stores_difference(step)
        if branch == "uncond" and stores_difference:
            names.append(DIFFERENCE)
        if branch == "cond" and (stores_difference or self._shares(step)):
            names.append(SHARED)
        return names

    def _stores_difference(self, step: int) -> bool:
        both = self._computed(step, "cond") and self._computed(step, "uncond")
        return both and self._is_used(step, "uncond", DIFFERENCE)

    def _shares(self, step: int) -> bool:
        return shares(self.rows["uncond"][step][1])

    def _is_used(self, step: int, branch: str, name: str) -> bool:
        """Whether a later step reads the value stored under `name` here, before newer ones push it out."""
        newer = 0
        for later in range(step + 1, self.steps):
            _, method = self.rows[branch][later]
            if self._computed(later, branch):
                newer += name == OUT or self._computed(later, "cond")
                if newer >= self.deepest:
                    return False
            elif (DIFFERENCE if shares(method) else OUT) == name and nodes_of(method) > newer:
                return True
        return False
