"""What every choice of every head would cost: errors and seconds, measured along a run of the pipeline.

At each call the pipeline makes of a denoiser a forward runs in which a `Scorer` stands at every attention:
it computes full attention, everything on the menu, and what older steps left behind, and notes the error of
each to full attention as the model's later layers would feel it (`sensitivity`). It answers with full
attention. Then the pipeline gets the forward of the plan in force, if there is one: errors are then those on
the latents that the plan leads to.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel import api
from dit_accel.block_heads import Near, Part
from dit_accel.bricks import Grid, best_brick
from dit_accel.errors import Slower, Unmet
from dit_accel.methods.attention.base import check
from dit_accel.methods.attention.full import Full
from dit_accel.plan import Key, Plan
from dit_accel.recipe import Choice, Recipe
from dit_accel.search.calls import Arguments
from dit_accel.search.forwards import Forwards
from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.felt import Felt, Rows, Split
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.segments import FULL, REUSE, Kind
from dit_accel.stages import now
from dit_accel.timeline import Entry, Track
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import Kind as OpKind

NAMES = ("cond", "uncond")
EVERY = 2  # steps; what needs a pass of its own (tails, coresets) is scored at one of so many
EARLY = 4  # steps at the beginning that are all scored: from one to the next errors differ up to 100 times


@functools.cache
def sampled(steps: int) -> frozenset[int]:
    """The steps at which what needs a pass of its own is scored."""
    return frozenset({*range(min(EARLY, steps)), *range(0, steps, EVERY), steps - 1})


@dataclass(frozen=True)
class Passed:
    """What a step left behind: [B, N, H, d] each, and the log-sum-exp [B, N, H] of a far part."""

    out: Split
    near: dict[Near, Split]
    far: dict[Near, tuple[Tensor, Tensor]]
    missed: dict[Near, Split]


Wrongs = dict[tuple[Kind, int], Split]  # (kind, age; 0 where there is none) -> what is wrong with its output


class Layer:
    """Scores one attention layer, on both branches."""

    def __init__(
        self, menu: Sequence[Candidate], ages: int, felt: Sequence[Felt], noted: Noted, rows: Rows
    ):  # fmt: skip
        self.menu, self.felt, self.noted, self.ages, self.rows = tuple(menu), felt, noted, ages, rows
        self.past = {name: deque[Passed](maxlen=ages + 1) for name in NAMES}  # the newest is last
        self.of_cond: Wrongs = {}

    def score(self, visit: AttentionVisit, branch: str, step: int) -> Tensor:
        """Note all errors of one call; gives full attention [B, N, H, d]."""
        if visit.again:  # a module's answer is the sum of its calls, and only the first was scored
            self.noted.forbid()
            return visit.dense()
        if step == 0:
            self.past[branch].clear()
        full = self._timed(FULL, functools.partial(full_of, visit))
        older = list(reversed(self.past[branch]))[: self.ages]
        passed = Passed(self.rows.split(visit, full), {}, {}, {})
        wrongs: Wrongs = {(REUSE, age): old.out - passed.out for age, old in enumerate(older, 1)}
        for candidate in self.menu:
            if candidate in self.noted.refused:
                continue
            try:
                self._candidate(candidate, visit, passed, older, wrongs)
            except (Slower, Unmet) as reason:
                self.noted.refused[candidate] = str(reason)
        self.past[branch].append(passed)
        if branch == "cond":
            self.of_cond = wrongs
        else:
            self._note(wrongs, step)
        return full

    def _timed(self, name: str, run: Callable[[], Any]) -> Any:
        began = now()  # after what a device has queued: only this call is timed
        result = run()
        self.noted.took(name, now() - began)
        return result

    def _candidate(
        self,
        candidate: Candidate,
        visit: AttentionVisit,
        passed: Passed,
        older: Sequence[Passed],
        wrongs: Wrongs,
    ) -> None:
        if candidate.method == "coreset":
            if visit.step in sampled(len(self.felt)):
                out = self._timed(candidate.name, functools.partial(candidate.build().attend, visit))
                wrongs[candidate, 0] = self.rows.split(visit, out) - passed.out
        elif candidate.method == "brick":
            check(visit, candidate.near, OpKind.ATTEND)
            wrongs[candidate, 0] = self._near(candidate, visit, passed) - passed.out
        elif candidate.method == "tail":
            self._tail(candidate, visit, passed, older, wrongs)
        else:
            check(visit, candidate.near, OpKind.ADD)
            passed.missed[candidate.near] = passed.out - self._near(candidate, visit, passed)
            for age, old in enumerate(older, 1):
                wrongs[candidate, age] = old.missed[candidate.near] - passed.missed[candidate.near]

    def _near(self, candidate: Candidate, visit: AttentionVisit, passed: Passed) -> Split:
        """What a near set alone gives, once for all that begin with it."""
        if candidate.near not in passed.near:
            run = functools.partial(visit.attend_blocks, Part(candidate.near))
            passed.near[candidate.near] = self.rows.split(visit, self._timed(candidate.name, run))
        return passed.near[candidate.near]

    def _tail(
        self,
        candidate: Candidate,
        visit: AttentionVisit,
        passed: Passed,
        older: Sequence[Passed],
        wrongs: Wrongs,
    ) -> None:
        near = candidate.near
        check(visit, near, OpKind.MERGE)
        left: list[tuple[Tensor, Tensor]] = []

        def keep(far: Tensor, lse: Tensor | None) -> None:
            assert lse is not None
            left.append((far.clone(), lse.clone()))

        emit = Part(near, OpKind.EMIT_TAIL, keep=keep)
        self._timed(f"anchor {candidate.name}", functools.partial(visit.attend_blocks, emit))
        passed.far[near] = left[0]
        if visit.step not in sampled(len(self.felt)):
            return
        for age, old in enumerate(older, 1):
            part = Part(near, OpKind.MERGE, *old.far[near])
            out = self._timed(candidate.name, functools.partial(visit.attend_blocks, part))
            wrongs[candidate, age] = self.rows.split(visit, out) - passed.out

    def _note(self, wrongs: Wrongs, step: int) -> None:
        """Both branches of a step are there: what each kind would cost."""
        felt, noted = self.felt[step], self.noted
        for (kind, age), uncond in wrongs.items():
            cond = self.of_cond[kind, age]
            noted.put(noted.pair, kind, step, age, felt.pair(self.rows, cond, uncond, "of_heads"))
            noted.put(noted.lone, kind, step, age, felt.lone(self.rows, cond, "of_heads"))
            if kind == REUSE:
                noted.module[step, age - 1] = felt.pair(self.rows, cond, uncond, "of_all")
                self._share(felt, cond, uncond, step, age)
        self.of_cond = {}

    def _share(self, felt: Felt, cond: Split, uncond: Split, step: int, age: int) -> None:
        """Uncond as cond and the difference of an older step: the difference is that of both changes."""
        nothing = Split(torch.zeros_like(cond.visual), torch.zeros_like(cond.text))
        wrong = Split(uncond.visual - cond.visual, torch.zeros_like(uncond.text))
        self.noted.share[step, age - 1] = felt.pair(self.rows, nothing, wrong, "of_heads")
        # a whole module's text is shared where the texts are of one length, else its own older one is taken
        wrong = Split(wrong.visual, uncond.text)
        self.noted.shared[step, age - 1] = felt.pair(self.rows, nothing, wrong, "of_all")


def full_of(visit: AttentionVisit) -> Tensor:
    """Full attention through the fastest backend."""
    try:
        return Full(backend="auto").attend(visit)
    except (Slower, Unmet):
        return visit.dense()


@dataclass(frozen=True)
class Scorer:
    """Stands where a method would, on one branch of one layer."""

    layer: Layer
    branch: str
    step_of: Callable[[], int]

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = False  # so that a batched pair is scored branch by branch

    @property
    def needs_grid(self) -> bool:
        """Only near sets do."""
        return bool(self.layer.menu)

    def brick_on(self, grid: Grid) -> Grid:
        """The brick that near sets lie in."""
        return best_brick(grid)

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return self.layer.score(visit, self.branch, self.step_of())

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def run_scored(
    pipe: Any, modules: Mapping[str, nn.Module], layers: Mapping[Key, Layer], levels: Sequence[float],
    generate: Callable[[], Any], recipe: Recipe | None = None,
) -> None:  # fmt: skip
    """One generation whose attention calls are scored; `recipe` is the plan it follows, None: dense."""
    with api.accelerated(pipe, _in_bricks(Recipe.neutral() if recipe is None else recipe)) as handle:
        session = handle.session

        def step_of() -> int:
            assert session.at is not None
            return session.at.step

        scoring = stands(
            session.denoisers, layers, levels, lambda key, branch: Scorer(layers[key], branch, step_of)
        )
        planned: list[Plan] = []

        def answer(component: str, arguments: Arguments) -> Any:
            if not planned and recipe is not None:
                planned.append(api.plan.resolve(recipe, tuple(session.denoisers.values()), tuple(levels)))
            output = forwards.run(component, {"": arguments}, scoring).outputs[""]
            return forwards.run(component, {"": arguments}, planned[0]).outputs[""] if planned else output

        forwards = Forwards(session, modules, answer)
        session.plan = scoring
        with forwards.watching():
            generate()


def _in_bricks(recipe: Recipe) -> Recipe:
    """The recipe with what makes an installation put tokens in brick order, which the near sets lie in."""
    choices = {"F": Choice("F", "full"), **recipe.choices, "Z": Choice("Z", "brick", {"extent": (0, 0, 0)})}
    attention = recipe.attention or {"both": {"*": ("F",)}}
    return dataclasses.replace(recipe, choices=choices, attention=attention)


def stands(
    denoisers: Mapping[str, Any],
    keys: Iterable[Key],
    levels: Sequence[float],
    method: Callable[[Key, str], Any],
) -> Plan:
    """The plan in which a method stands at some attentions, at every step: `method(key, branch)`."""
    tracks = {}
    for key in keys:
        heads = denoisers[key[0]].attention[key[1]]
        rows = {
            branch: (Entry("." * heads, ((method(key, branch), tuple(range(heads))),), {}),) * len(levels)
            for branch in NAMES
        }
        tracks[key] = Track(rows, 0)
    return Plan(tracks, {}, {}, tuple(levels), {}, ())
