"""The state of one pipeline's runs: where the loop is, the plan in force, memory, counters and notes.

A Session is shared by all denoisers of a pipeline. `begin` and `end` are called around every forward of a
denoiser; in between the attention core and the block hooks ask what to do at their site.
"""

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.errors import DenseFallback, MemoryBound, NothingDone
from dit_accel.memory import Address, Memory
from dit_accel.plan import Key, Plan, resolve
from dit_accel.recipe import Recipe
from dit_accel.run_report import Report, Row, merge, method_name
from dit_accel.sites import Denoiser
from dit_accel.timeline import Track
from dit_accel.tracker import Tracker
from dit_accel.work import Work, branches_of


@dataclass(frozen=True)
class Forward:
    """One forward of one denoiser, as its sites see it."""

    component: str
    step: int
    branch: str
    grid: tuple[int, int, int]
    references: int  # visual tokens after the target's
    text_first: bool
    joint: bool  # text and visual tokens share the self-attention
    batch: int
    brick: tuple[int, int, int] | None = None  # visual tokens stand in bricks of this size between blocks

    @property
    def layout(self) -> tuple[Any, ...]:
        """What stored values depend on besides site and branch."""
        return (self.grid, self.references, self.brick)

    @property
    def visual(self) -> int:
        return math.prod(self.grid) + self.references


class Session:
    """One accelerated pipeline. Not thread-safe: one run at a time, as the pipeline itself."""

    def __init__(
        self, recipe: Recipe, denoisers: Mapping[str, tuple[Denoiser, Any]], pipe: Any, strict: bool
    ):
        self.recipe, self.strict = recipe, strict
        self.denoisers = {name: record for name, (record, _) in denoisers.items()}
        self.families = {name: family for name, (_, family) in denoisers.items()}
        self.tracker = Tracker()
        self.memory = Memory(storage=recipe.storage)
        self.device: torch.device | None = None  # of the running forward
        self.plan: Plan | None = None
        self.at: Forward | None = None
        self.dense_until_next_run = False
        self.approximated = 0  # approximating visits of the running forward
        self.predicted: dict[tuple[str, str], int] = {}
        self.scratch: dict[Any, Any] = {}  # values that live for one forward
        self.bricks: dict[Any, frozenset[Any]] = {}  # (component, grid) -> bricks that methods want
        self.raster: dict[str, str] = {}  # component -> why its tokens keep the model's order
        self._pipe = weakref.ref(pipe)
        self._new_books()
        self._notes: dict[str, list[str]] = {}
        self._checked_end = True

    @property
    def pipe(self) -> Any:
        """The pipeline, or None once it is gone."""
        return self._pipe()

    # ---- one forward

    def begin(
        self, component: str, config: Any, context: tuple[str, int | None] | None, inputs: Mapping[str, Any]
    ) -> None:
        """Note where the loop is. `inputs` are the denoiser's forward arguments by name."""
        family = self.families[component]
        self.device = inputs["hidden_states"].device
        position = self.tracker.advance(self.pipe, component, family.guidance, context, inputs)
        if position.new_run:
            self._start_run()
        if position.step < 0:
            self.fallback("the denoiser was called outside a schedule of its pipeline: that call ran dense")
        self.at = Forward(
            component=component,
            step=position.step,
            branch=position.branch,
            grid=family.grid(config, inputs),
            references=family.references(config, inputs),
            text_first=family.token_order.startswith("text"),
            joint="text" in family.token_order,
            batch=inputs["hidden_states"].shape[0],
        )
        self.work.forward(component, position.branch, self.active)
        self.approximated = 0
        self.scratch = {}

    def place(self, brick: tuple[int, int, int]) -> None:
        """The visual tokens of this forward stand in bricks of this size between its blocks."""
        assert self.at is not None
        self.at = replace(self.at, brick=brick)

    def end(self) -> None:
        """The forward is over."""
        self.at = None
        self.scratch = {}

    @contextlib.contextmanager
    def only(self, branch: str) -> Generator[None]:
        """One half of a batched pair runs alone: the sites inside see their branch and its batch."""
        both = self.at
        assert both is not None
        self.at = replace(both, branch=branch, batch=both.batch // 2)
        try:
            yield
        finally:
            self.at = both

    def repeat_dense(self) -> None:
        """A non-finite output: this forward and the rest of the run use the model's own computation."""
        at = self.at
        assert at is not None
        self.fallback(f"non-finite output at step {at.step} ({at.branch}): dense for the rest of the run")
        self.dense_until_next_run = True
        self.memory.release()
        self.scratch = {}
        self.work.idle[at.component] += branches_of(at.branch)  # this forward runs once more, in full
        self.at = replace(at, brick=None)

    @property
    def active(self) -> bool:
        """Whether sites may do anything but their own computation now."""
        at = self.at
        idle = at is None or self.plan is None or self.dense_until_next_run
        return not idle and at is not None and at.step >= 0 and at.branch != "other"

    def track(self, seam: str, key: Key) -> Track | None:
        """The track of a site, None where the recipe leaves it alone or the session is idle."""
        if not self.active or self.plan is None:
            return None
        return (self.plan.attention if seam == "attention" else self.plan.timeline).get(key)

    def address(self, key: Key, branch: str) -> Address:
        """Where a site's values of a branch are stored in the current layout."""
        assert self.at is not None
        return (*key, branch, self.at.layout)

    # ---- books

    def count(
        self, key: Key, branch: str, letters: str, done: Mapping[Any, int], computed: str = "full"
    ) -> None:
        """Record what a visit did: letters as run, and how many heads each method served (None: model)."""
        assert self.at is not None
        row = self._ran.setdefault((key, branch), {})
        row[self.at.step] = letters
        for method, heads in done.items():
            self._counters[key[1], computed if method is None else method_name(method)] += heads
            self.approximated += int(method is not None and not method.exact)

    def note(self, text: str, site: str = "") -> None:
        """A sentence for the report, once for all the sites it holds for."""
        self._notes.setdefault(text, []).append(site)

    def note_once(self, text: str, site: str) -> None:
        """A note about how a site runs at every visit."""
        if site not in self._notes.get(text, ()):
            self.note(text, site)

    def fallback(self, text: str, site: str = "") -> None:
        """A site or a run fell back to the model's own computation; an error under strict."""
        if self.strict:
            at = f"{site}: " if site else ""
            raise DenseFallback(
                f"{at}{text} (strict=True asked for no fallback). Mend the recipe or drop strict."
            )
        self.note(text, site)

    def report(self) -> Report:
        """The last run."""
        plan = self.plan
        notes = [
            *(plan.notes if plan else ()),
            *(_sentence(text, sites) for text, sites in self._notes.items()),
        ]
        return Report(
            recipe=self.recipe.name,
            family=" + ".join(dict.fromkeys(family.name for family in self.families.values())),
            steps=len(self.tracker.levels),
            runs=self.tracker.runs,
            counters=merge(self._counters),
            rows=tuple(self._rows()),
            legend=dict(plan.legend) if plan else {},
            notes=tuple(notes),
            memory_bytes=self.memory.peak_bytes,
            predicted_bytes=sum(self.predicted.values()),
            levels=self.tracker.levels,
            expects_work=not self.recipe.is_neutral(),
            exact={**{name: count for name, count in self.exact.items() if count}, **self.exact_reasons},
            attention_kept=self.work.kept(self.denoisers, plan.spans if plan else {}),
        )

    def finish(self) -> None:
        """The pipeline's call is over: free memory and ring the alarm if nothing was done."""
        self.memory.release()
        self.tracker.forget_schedule()
        if self._checked_end or self.plan is None:
            return
        self._checked_end = True
        if not self.recipe.is_neutral() and not self.report().did_something:
            text = f"recipe {self.recipe.name} changed nothing in this run"
            self.note(text)
            if self.strict:
                raise NothingDone(f"{text}. Asked: an acceleration; found: {self.report()}")
            _warn(f"{text}; see handle.report()")

    def forbid_memory(self, needed: int) -> None:
        """The run would keep more than the recipe allows."""
        limit = (self.recipe.memory_gb or 0) * 2**30
        text = (
            f"the recipe allows {limit / 2**20:.1f} MiB of stored outputs, the run needs {needed / 2**20:.1f}"
        )
        if self.strict:
            raise MemoryBound(f"{text}. Raise [limits] memory_gb, or use fewer or larger spans.")
        self.note(f"{text}: it runs dense")
        self.dense_until_next_run = True

    # ---- inside

    def _start_run(self) -> None:
        self.memory.clear()
        self.predicted.clear()
        self.bricks.clear()
        self.raster.clear()
        self.dense_until_next_run = False
        self._new_books()
        self._notes = {}
        self._checked_end = False
        levels = self.tracker.levels
        if not levels:
            self.plan = None
        elif self.plan is None or self.plan.levels != levels:
            self.plan = resolve(
                self.recipe, tuple(self.denoisers.values()), levels, self._shares_of_run(levels)
            )

    def _shares_of_run(self, levels: tuple[float, ...]) -> dict[str, frozenset[int]]:
        """Which steps each denoiser runs: Wan 2.2 hands over from one to the other at a noise level."""
        ratio = getattr(getattr(self.pipe, "config", None), "boundary_ratio", None)
        if ratio is None or len(self.denoisers) < 2:
            return {}
        first = frozenset(step for step, level in enumerate(levels) if level >= ratio)
        return {"transformer": first, "transformer_2": frozenset(range(len(levels))) - first}

    def _new_books(self) -> None:
        self._counters: Counter[tuple[str, str]] = Counter()
        self._ran: dict[tuple[Key, str], dict[int, str]] = {}
        self.work = Work()
        self.exact: Counter[str] = Counter()  # rows and bytes of exact tables, by name
        self.exact_reasons: dict[str, str] = {}  # "modulation", "text k/v" -> why there is none

    def _rows(self) -> list[Row]:
        steps = range(len(self.tracker.levels))
        rows: list[Row] = []
        for (key, branch), ran in self._ran.items():
            track = self.plan and (self.plan.attention.get(key) or self.plan.timeline.get(key))
            planned = tuple(track.entry(k, branch).letters for k in steps) if track else ()
            site = key[1] if key[0] == "transformer" else f"{key[0]}.{key[1]}"
            rows.append(Row(site, branch, planned, tuple(ran.get(k, "") for k in steps)))
        return rows


def _sentence(text: str, sites: list[str]) -> str:
    names = list(dict.fromkeys(site for site in sites if site))
    where = (
        f"{names[0]}: "
        if len(names) == 1
        else f"{names[0]} and {len(names) - 1} more sites: "
        if names
        else ""
    )
    return f"{where}{text}" + (f" ({len(sites)} times)" if len(sites) > 1 else "")


def _warn(text: str) -> None:
    import warnings

    warnings.warn(f"dit_accel: {text}", stacklevel=3)
