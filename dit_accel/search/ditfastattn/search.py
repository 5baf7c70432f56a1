"""DiTFastAttn as a search: one run of the pipeline on the calibration prompts gives one recipe for a delta.

Source: DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552. The decisions are `greedy`'s; here is what is around
them: checks that fail before the pipeline runs, and the recipe of what was decided.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_accel import api
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.recipe import Recipe
from dit_accel.search import subject
from dit_accel.search.ditfastattn import layer_picks, menu
from dit_accel.search.ditfastattn.greedy import Decisions, Greedy, searched_layers
from dit_accel.search.goal import FIRST_DELTAS
from dit_accel.search.method import FULLS, Ended, Search, Told
from dit_accel.search.subject import call_of, denoisers_of
from dit_accel.search.trajectory import family_of_model, guidance_of
from dit_accel.stages import stages


@dataclass(frozen=True)
class DiTFastAttn(Search):
    """The greedy search over layers and steps."""

    near: str = "band"

    name: ClassVar[str] = "ditfastattn"
    decided: ClassVar[type[Decisions]] = Decisions

    @property
    def first_delta(self) -> float:
        return FIRST_DELTAS[self.name]

    @property
    def near_set(self) -> dict[str, Any]:
        """Parameters of the windows."""
        return menu.near_set(self.near, self.grid)

    @property
    def settings(self) -> dict[str, Any]:
        return {"near": self.near}

    def stored_bytes(self) -> int:
        """An output and a residual of every layer and branch."""
        return 2 * self.stored_rows * self.item_bytes * sum(self.width(key) for key in self.layers())

    def run(
        self, delta: float, decisions: Decisions, ended: Ended, saved: Callable[[], None], told: Told
    ) -> None:
        pipe, steps = self.model.pipe, len(self.levels)
        layers = len(self.sites) // len(denoisers_of(self.model))
        with api.accelerated(pipe, self._installed(), strict=True) as handle:
            greedy = Greedy(
                handle.session,
                denoisers_of(self.model),
                searched_layers(handle.session, self.sites),
                self.near_set,
                delta,
                decisions,
                ended,
                saved,
                lambda step, layer: told(step * layers + layer, steps * layers),
            )
            with greedy.forwards.watching(), stages(pipe):
                pipe(**call_of(self.jobs, self.arguments), output_type="latent")

    def recipe_of(self, decisions: Decisions) -> Recipe:
        rows = dict.fromkeys(self.always_full(), menu.idle(len(self.levels)))
        layer = dict.fromkeys(denoisers_of(self.model), 0)
        for key in self.layers():
            history = decisions.history(key[0], layer[key[0]], len(self.levels))
            rows[key] = menu.rows_of(history, self.joint)
            layer[key[0]] += 1
        return menu.recipe_of(
            rows, self.levels, self.near_set, self.made_for, self.name, self.memory_gb, FULLS[self.full]
        )

    def picture(self, delta: float, decisions: Decisions) -> str:
        return layer_picks.picture(self.sites, len(self.levels), delta, decisions)

    def _installed(self) -> Recipe:
        """What the first step runs: everything full, and all that a second step may read is kept."""
        rows = menu.rows_of(menu.FULL, self.joint, storing=True)
        rows += menu.future(self.joint, windows=True, shared=False)
        rows += menu.idle(len(self.levels) - len(rows.cond))
        return menu.recipe_of(dict.fromkeys(self.layers(), rows), self.levels, self.near_set, self.made_for)


def look(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], sites: Sequence[str] = (),
    near: str = "band", memory_gb: float | None = None, full: str = "model",
) -> DiTFastAttn:  # fmt: skip
    """The search of a model, checked; the pipeline runs up to its first call of a denoiser.

    Raises BadUsage where there is nothing to search: besides what `subject.look` refuses, no guidance, an
    unknown near set, or too little memory for what a search keeps.
    """
    guidance_of(model, family_of_model(model), arguments)
    if near not in menu.NEARS:
        raise BadUsage(f'asked for the near set "{near}"; known: {", ".join(menu.NEARS)}. Give one of them.')
    seen = subject.look(model, jobs, arguments, sites)
    search = DiTFastAttn(**seen.as_fields(), near=near, memory_gb=memory_gb, full=full)
    search.check()
    return search
