"""The best plan of one attention layer at a price of time, exactly, by dynamic programming over its steps.

A layer's steps fall into segments. A segment begins with an anchor, at which both branches compute every
head; at each later step of it the module computes on both branches (CC), or uncond is cond's output and the
stored difference (CS), or cond answers with its last output and uncond follows it (RS). Where the module
computes, every head picks for itself: full, something stateless, or what its anchor of this segment feeds (a
tail or residual of one near set, or its output again); and for uncond either the same as cond, or cond's head
and the stored difference. The cost of a pick is its error in the sample plus the price of its seconds; costs
add up, so that the least sum over all segmentations, patterns and picks is found, not approached.

Why branches go together: with v = u + g (c - u), errors of cond and uncond that are alike leave v as little
wrong as one of them, though each alone would count g^2 and (1 - g)^2 times.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dit_accel.search.plan.candidates import Candidate

CC, CS, RS = 0, 1, 2  # what both branches do at a step
FULL, REUSE = "full", "reuse"
Kind = Candidate | str  # str: FULL or REUSE
FAR_TOO_MUCH = 1e30  # stands for infinity where it is multiplied by 0
Fed = tuple[Kind | None, bool]  # what a head's anchor feeds, and whether uncond's head follows cond's


@dataclass(frozen=True)
class LayerTable:
    """Errors in the sample (squared, weighted) and seconds of all that one layer may do.

    `pair` are errors where both branches do the same, `lone` where cond does and uncond follows: [T, H] of a
    stateless candidate, [T, A, H] of an anchored one and of REUSE, index 0 being age 1. `share` [T, A, H] is
    the error of a head's stored difference, `shared` [T, A] that of a module's, `module` [T, A] that of both
    branches' outputs reused. What cannot be is infinite. `seconds` are of one head of a kind on one branch,
    `anchors` of the full pass that feeds it, `around` of a branch's projections.
    """

    pair: Mapping[Kind, np.ndarray]
    lone: Mapping[Kind, np.ndarray]
    share: np.ndarray
    module: np.ndarray
    shared: np.ndarray
    seconds: Mapping[Kind, float]
    anchors: Mapping[Kind, float]
    around: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """Steps, ages, heads."""
        steps, ages, heads = self.share.shape
        return steps, ages, heads

    def near(self) -> list[Kind]:
        """The stateless candidates."""
        return [kind for kind in self.pair if isinstance(kind, Candidate) and not kind.anchored]

    def fed(self) -> list[Kind]:
        """What an anchor can feed."""
        return [
            kind for kind in self.pair if kind == REUSE or (isinstance(kind, Candidate) and kind.anchored)
        ]


@dataclass
class LayerPlan:
    """What a layer does: `actions` [T], and at each step that computes what each head does.

    `picks[step][head]` is cond's kind, `follows[step][head]` whether uncond's head takes cond's and the
    stored difference, `feeds[step][head]` the anchored candidate that a full pass leaves something for.
    """

    actions: list[int]
    picks: list[list[Kind]]
    follows: list[list[bool]]
    feeds: list[list[Candidate | None]]
    by_step: list[float] = field(default_factory=list[float])  # error that each step adds
    seconds: float = 0.0

    @classmethod
    def full(cls, steps: int, heads: int) -> "LayerPlan":
        """Everything computed in full."""
        return cls(
            [CC] * steps,
            [[FULL] * heads for _ in range(steps)],
            [[False] * heads for _ in range(steps)],
            [[None] * heads for _ in range(steps)],
            [0.0] * steps,
        )

    @property
    def error(self) -> float:
        """The predicted error of the sample."""
        return sum(self.by_step)


class LayerSolver:
    """Solves one layer at any price."""

    def __init__(self, table: LayerTable):
        self.table = table
        self.steps, self.ages, self.heads = table.shape
        self.moduled = {
            (start, length): self._module_errors(start, length)
            for start in range(self.steps)
            for length in range(1, min(self.ages + 1, self.steps - start) + 1)
        }

    def solve(self, price: float) -> LayerPlan:
        """The plan with the least error + price * seconds."""
        least = [0.0, *([np.inf] * self.steps)]
        chosen: list[tuple[int, int]] = [(0, 0)] * (self.steps + 1)
        costs = _Costs(self.table, price)
        for start in range(self.steps):
            for length in range(1, min(self.ages + 1, self.steps - start) + 1):
                totals = self._pattern_costs(start, length, costs)
                best = int(np.argmin(totals))
                total = least[start] + float(totals[best])
                if total < least[start + length]:
                    least[start + length] = total
                    chosen[start + length] = (start, best)
        return self._trace(chosen, costs)

    def _pattern_costs(self, start: int, length: int, costs: "_Costs") -> np.ndarray:
        """[3^(length - 1)]: the cost of each pattern of a segment."""
        both, alone = _patterns(length - 1)
        by_kind = [
            first + both @ pair[: length - 1] + alone @ lone[: length - 1]
            for first, pair, lone in costs.by_feed(start)
        ]
        heads = np.min(by_kind, axis=0).sum(1)
        computed = 2 + 2 * both.sum(1) + alone.sum(1)
        return heads + costs.price * self.table.around * computed + self.moduled[start, length]

    def _module_errors(self, start: int, length: int) -> np.ndarray:
        """[3^(length - 1)]: the error of what whole modules answer with in each pattern."""
        patterns = itertools.product((CC, CS, RS), repeat=length - 1)
        return np.array([sum(self._answered(start, actions)) for actions in patterns])

    def _answered(self, start: int, actions: tuple[int, ...]) -> list[float]:
        """The error at each later step of a segment of what whole modules answer with."""
        table, errors = self.table, []
        both = computed = start  # the last steps at which both branches, and cond, computed
        for step, action in enumerate(actions, start + 1):
            error = 0.0
            if action == CS:
                error = table.shared[step, step - both - 1]
                computed = step
            elif action == RS:
                error = table.module[step, step - computed - 1]
                # uncond follows cond's last output: what that was wrong by when it was made stays
                error += table.shared[computed, computed - both - 1] if computed > both else 0.0
            else:
                both = computed = step
            errors.append(float(error))
        return errors

    # ---- the plan behind the least cost

    def _trace(self, chosen: list[tuple[int, int]], costs: "_Costs") -> LayerPlan:
        plan = LayerPlan.full(self.steps, self.heads)
        end = self.steps
        while end:
            start, pattern = chosen[end]
            actions = tuple(itertools.product((CC, CS, RS), repeat=end - start - 1))[pattern]
            answered = self._answered(start, actions)
            for step, (action, error) in enumerate(zip(actions, answered, strict=True), start + 1):
                plan.actions[step] = action
                plan.by_step[step] += error
            plan.seconds += self.table.around * (2 + sum(2 - action for action in actions))
            self._write_heads(plan, start, actions, costs)
            end = start
        return plan

    def _write_heads(self, plan: LayerPlan, start: int, actions: tuple[int, ...], costs: "_Costs") -> None:
        """The picks of all heads in one segment."""
        both = [at for at, action in enumerate(actions) if action == CC]
        alone = [at for at, action in enumerate(actions) if action == CS]
        feeds = costs.feeds
        totals = [
            first + pair[both].sum(0) + lone[alone].sum(0) for first, pair, lone in costs.by_feed(start)
        ]
        for head, best in enumerate(np.argmin(np.stack(totals), axis=0)):
            fed, follows = feeds[best]
            later = [(start + 1 + at, costs.pick(fed, follows, start, start + 1 + at, head)) for at in both]
            later += [
                (start + 1 + at, costs.pick(fed, True, start, start + 1 + at, head, module=True))
                for at in alone
            ]
            if not any(picked.kind == fed for _, picked in later):
                fed = None  # nothing reads it
            self._write(plan, start, head, costs.first(fed, start, head))
            if isinstance(fed, Candidate):
                plan.feeds[start][head] = fed
            for step, picked in later:
                self._write(plan, step, head, picked)
                plan.follows[step][head] = follows and plan.actions[step] == CC

    def _write(self, plan: LayerPlan, step: int, head: int, picked: "_Picked") -> None:
        plan.picks[step][head] = picked.kind
        plan.by_step[step] += picked.error
        plan.seconds += picked.seconds


@dataclass(frozen=True)
class _Picked:
    kind: Kind
    error: float
    seconds: float


class _Costs:
    """What heads cost at one price."""

    def __init__(self, table: LayerTable, price: float):
        self.table, self.price = table, price
        self.steps, self.ages, self.heads = table.shape
        self.stateless: list[Kind] = [FULL, *table.near()]
        blank = np.zeros((self.steps, self.heads))
        self.pair_errors = np.stack([blank, *(table.pair[kind] for kind in table.near())])  # [K, T, H]
        self.lone_errors = np.stack([blank, *(table.lone[kind] for kind in table.near())])
        seconds = price * np.array([table.seconds[kind] for kind in self.stateless])[:, None, None]
        self.pair = self.pair_errors + 2 * seconds
        self.lone = self.lone_errors + seconds
        self.feeds: list[Fed] = [(fed, follows) for fed in (None, *table.fed()) for follows in (False, True)]

    def by_feed(self, start: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each of `feeds` the costs [H] at the anchor, [A, H] where both compute, and where cond does."""
        if start not in self._known:
            self._known[start] = [self._of(fed, follows, start) for fed, follows in self.feeds]
        return self._known[start]

    @functools.cached_property
    def _known(self) -> dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        return {}

    def _of(self, fed: Kind | None, follows: bool, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        last = min(self.ages, self.steps - start - 1)
        steps, ages = start + 1 + np.arange(last), np.arange(last)
        pair, lone = self.pair[:, steps].min(0), self.lone[:, steps].min(0)  # [last, H]
        first = self.pair[:, start].min(0)
        if fed is not None:
            seconds = self.price * self.table.seconds[fed]
            own_pair = self.table.pair[fed][steps, ages] + 2 * seconds
            own_lone = self.table.lone[fed][steps, ages] + seconds
            # what is fed by its anchor outlives full and stateless steps; an output does not
            mixes = isinstance(fed, Candidate)
            pair = np.minimum(pair, own_pair) if mixes else own_pair
            lone = np.minimum(lone, own_lone) if mixes else own_lone
            first = np.full(self.heads, 2 * self.price * self.table.anchors[fed])
        if follows:
            pair = lone + self.table.share[steps, ages]
        return first, np.minimum(pair, FAR_TOO_MUCH), np.minimum(lone, FAR_TOO_MUCH)

    def first(self, fed: Kind | None, start: int, head: int) -> _Picked:
        """What a head does at its anchor."""
        if fed is not None:
            return _Picked(FULL, 0.0, 2 * self.table.anchors[fed])
        best = int(np.argmin(self.pair[:, start, head]))
        kind = self.stateless[best]
        return _Picked(kind, float(self.pair_errors[best, start, head]), 2 * self.table.seconds[kind])

    def pick(
        self, fed: Kind | None, follows: bool, start: int, step: int, head: int, module: bool = False
    ) -> _Picked:
        """What a head does after its anchor; `module`: uncond's whole module follows cond's."""
        costs, errors = (self.lone, self.lone_errors) if follows else (self.pair, self.pair_errors)
        branches, age = 1 if follows else 2, step - start - 1
        best = int(np.argmin(costs[:, step, head]))
        kind, error = self.stateless[best], float(errors[best, step, head])
        if fed is not None:
            own = float((self.table.lone if follows else self.table.pair)[fed][step, age, head])
            cost = own + branches * self.price * self.table.seconds[fed]
            if fed == REUSE or cost < costs[best, step, head]:
                kind, error = fed, own
        if follows and not module:
            error += float(self.table.share[step, age, head])
        return _Picked(kind, error, branches * self.table.seconds[kind])


@functools.cache
def _patterns(count: int) -> tuple[np.ndarray, np.ndarray]:
    """[3^count, count] each: at which steps both branches compute, and at which cond alone does."""
    rows = np.array(list(itertools.product((CC, CS, RS), repeat=count))).reshape(3**count, count)
    return (rows == CC).astype(float), (rows == CS).astype(float)
