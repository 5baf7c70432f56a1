"""DiTFastAttnV2 as a search: one generation of all calibration prompts gives a recipe head by head.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796. The decisions are `progressive`'s; here is what is
around them: checks that fail before the pipeline runs, its plan, and the recipe of what was decided.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel import api
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.plan import Key, Plan
from dit_accel.recipe import Recipe
from dit_accel.search import subject
from dit_accel.search.ditfastattn_v2 import felt_error, head_picks
from dit_accel.search.ditfastattn_v2.candidates import FULL, MENUS, REUSE, Menu, menu_of
from dit_accel.search.ditfastattn_v2.head_error import ERRORS, projection_of
from dit_accel.search.ditfastattn_v2.modules import letters_of
from dit_accel.search.ditfastattn_v2.progressive import HeadDecisions, Progressive, Terms, place_of
from dit_accel.search.ditfastattn_v2.trial import Trial
from dit_accel.search.goal import FIRST_DELTAS
from dit_accel.search.method import FULLS, Ended, Search, Told
from dit_accel.search.rows import recipe_of_rows
from dit_accel.search.subject import call_of
from dit_accel.search.trajectory import guidance_of
from dit_accel.stages import stages
from dit_accel.timeline import BRANCHES, TAIL_LSE, Entry, Track


@dataclass(frozen=True)
class DiTFastAttnV2(Search):
    """The head-wise search: a program for each layer, step and branch."""

    menu: str = "v2"
    error: str = "projected"
    interval: int = 1

    name: ClassVar[str] = "ditfastattn_v2"
    decided: ClassVar[type[HeadDecisions]] = HeadDecisions

    @functools.cached_property
    def candidates(self) -> Menu:
        """The menu on this grid."""
        return menu_of(self.menu, self.grid, len(self.levels), FULLS[self.full])

    @functools.cached_property
    def heads(self) -> Mapping[Key, int]:
        """Layers in forward order, with their heads."""
        return {key: self.attention(key).heads for key in self.layers()}

    @functools.cached_property
    def felt(self) -> Mapping[Key, felt_error.FeltError]:
        """How errors of each layer are felt, measured once; nothing where errors are another's."""
        return felt_error.measure(self) if self.error == "felt" else {}

    @property
    def first_delta(self) -> float:
        if self.error == "felt":
            return FIRST_DELTAS["felt"]
        # errors relative to a head are larger than relative to the layer, by about the number of heads
        heads = max(self.heads.values())
        return FIRST_DELTAS[self.name] * (heads if self.error == "head" else 1)

    @property
    def settings(self) -> dict[str, Any]:
        return {"menu": self.menu, "error": self.error, "interval": self.interval, "full": self.full}

    def stored_bytes(self) -> int:
        """The last outputs, what every anchored candidate stores, what is shared, and projections."""
        kept = [name for each in self.candidates.anchored for name in each.method.keeps]
        values = sum(name != TAIL_LSE for name in kept)
        values += any(each.letter == REUSE for each in self.candidates.candidates)
        visual = math.prod(self.grid) / (math.prod(self.grid) + self.text)  # of all rows
        needed = 0
        for key, heads in self.heads.items():
            width = self.width(key)
            needed += self.stored_rows * (values * width * self.item_bytes + 4 * heads * kept.count(TAIL_LSE))
            if self.error == "projected":
                needed += 4 * width * width // heads * (2 if self.joint else 1)
            # cond's answers, uncond's differences, and what is wrong with cond's answers
            shared = self.candidates.shares + (0.5 if self.error == "felt" else 0)
            needed += int(shared * self.stored_rows * visual * width * self.item_bytes)
        return needed

    def run(
        self, delta: float, decisions: HeadDecisions, ended: Ended, saved: Callable[[], None], told: Told
    ) -> None:
        for text in self.candidates.left_out:
            decisions.note(text)
        terms = Terms(self.candidates, delta, self.error, self.interval, self.joint, self.felt)
        search = Progressive(terms, len(self.levels), decisions, ended, saved, told)
        pipe = self.model.pipe
        with api.accelerated(pipe, self._installed(), strict=True) as handle, stages(pipe):
            # a session keeps a plan whose noise levels are those of the run that starts
            handle.session.plan = self._plan(search)
            pipe(**call_of(self.jobs, self.arguments), output_type="latent")

    def recipe_of(self, decisions: HeadDecisions) -> Recipe:
        steps = len(self.levels)
        across = dict.fromkeys(self.always_full(), [FULL] * steps)
        rows: dict[str, dict[Key, list[str]]] = {branch: dict(across) for branch in BRANCHES}
        for key, heads in self.heads.items():
            for branch in BRANCHES:
                place = place_of(branch, key)
                # without guidance there is one branch
                place = place if place in decisions.picks else place_of("cond", key)
                lanes = [self.candidates.row(each) for each in decisions.histories(place, steps, heads)]
                rows[branch][key] = ["".join(lane[step] for lane in lanes) for step in range(steps)]
        return self._recipe(rows, idle="" if FULLS[self.full] else FULL, skipping=True)

    def picture(self, delta: float, decisions: HeadDecisions) -> str:
        return head_picks.picture(self.heads, len(self.levels), self.candidates, delta, self.error, decisions)

    def _recipe(
        self, rows: Mapping[str, Mapping[Key, Sequence[str]]], idle: str, skipping: bool = False
    ) -> Recipe:
        """With `skipping` a module all of whose heads reuse does not run: its last output is the same."""
        skipped: dict[str, dict[Key, str]] = {branch: {} for branch in BRANCHES}
        for key in self.heads:
            modules = letters_of(rows["cond"][key], rows["uncond"][key], self.joint)
            for branch, letters in zip(BRANCHES, modules, strict=True):
                skipped[branch][key] = letters
        timeline, choices = (
            (skipped if skipping else {}),
            {"C": {"method": "compute"}, **self.candidates.choices},
        )
        return recipe_of_rows(
            rows, timeline, choices, self.levels, self.made_for, self.name, self.memory_gb, idle
        )

    def _installed(self) -> Recipe:
        """A recipe that wants at every layer all that the search will run there."""
        letters = [FULL, *(each.letter for each in self.candidates.candidates)]
        texts = [letters[step % len(letters)] for step in range(len(self.levels))]
        return self._recipe({branch: dict.fromkeys(self.heads, texts) for branch in BRANCHES}, idle=FULL)

    def _plan(self, search: Progressive) -> Plan:
        """Trials at every layer and step; one for each branch, so that a batched pair is taken apart."""
        tracks = {}
        for key, heads in self.heads.items():
            entries = {}
            for branch in BRANCHES:
                answer = functools.partial(
                    search.answer, key=key, branch=branch, attention=self.attention(key)
                )
                trial = Trial(answer, self.candidates)
                entry = Entry("T" * heads, ((trial, tuple(range(heads))),), {})
                entries[branch] = (entry,) * len(self.levels)
            tracks[key] = Track(entries, 0)
        return Plan(tracks, {}, {}, self.levels, {"T": "searched"}, ())


def look(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], sites: Sequence[str] = (),
    menu: str = "v2", error: str = "projected", interval: int = 1, memory_gb: float | None = None,
    full: str = "model",
) -> DiTFastAttnV2:  # fmt: skip
    """The search of a model, checked; the pipeline runs up to its first call of a denoiser.

    Raises BadUsage where there is nothing to search: besides what `subject.look` refuses, an unknown menu or
    error, felt errors without guidance, a menu of which nothing serves at this size, or too little memory
    for what a search keeps.
    """
    for asked, known, option in ((menu, MENUS, "menu"), (error, ERRORS, "error")):
        if asked not in known:
            raise BadUsage(f'asked for the {option} "{asked}"; known: {", ".join(known)}. Give one of them.')
    if interval < 1:
        raise BadUsage(
            f"asked for a decision every {interval} steps; it must be 1 or more. Give another --interval."
        )
    seen = subject.look(model, jobs, arguments, sites)
    search = DiTFastAttnV2(
        **seen.as_fields(), memory_gb=memory_gb, full=full, menu=menu, error=error, interval=interval
    )
    if error == "felt":
        guidance_of(model, seen.family, arguments)
    if error != "head":
        for key in search.heads:
            projection_of(search.attention(key))
    search.check()
    return search
