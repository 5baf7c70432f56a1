"""VORTA as a search: routers trained on a frozen model become a recipe of attention by noise level.

Source: VORTA, Sun et al. 2025, arXiv:2505.18809. Here is what a training needs and leaves behind; how its
result becomes a recipe is in `router_table`, the budget and the goal are in `vorta_pursuit`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.recipe import Recipe
from dit_accel.search.kept import Kept
from dit_accel.search.method import FULLS
from dit_accel.search.saved import digest_of
from dit_accel.search.subject import denoisers_of
from dit_accel.search.trajectory import family_of_model
from dit_accel.search.vorta.table import compile_table
from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.optimizer import Adam
from dit_accel.train.vorta.branches import CORESETS, Branches, branches_of
from dit_accel.train.vorta.objective import Objective, Weights, embeddings, measure_costs
from dit_accel.train.vorta.routed import Routed, time_embedder_of
from dit_accel.train.vorta.router import Routers, load_routers, save_routers
from dit_accel.train.vorta.samples import Sample, Schedule, collect

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How routers are trained; what the paper publishes, but that a price may be the measured latency."""

    steps: int = 100
    micro_batches: int = 4
    lr: float = 1e-2
    coreset: str = "published"
    full: str = "model"  # who attends for full heads: the model, or the fastest backend
    recompute: bool = False  # activations in the backward: less memory, the same numbers
    weights: Weights = field(default_factory=Weights)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.coreset not in CORESETS:
            raise BadUsage(
                f'asked for the coreset "{self.coreset}"; known: {", ".join(CORESETS)}. Give one of them.'
            )
        if self.full not in FULLS:
            raise BadUsage(
                f'asked for full heads by "{self.full}"; known: {", ".join(FULLS)}. Give one of them.'
            )


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings by the names of the command's options; what is None or absent is as published."""
    own = {"steps_of_training": "steps", "micro_batches": "micro_batches"}
    own |= {name: name for name in ("coreset", "full", "recompute")}
    weights = {"price": "priced", "temperature": "temperature"}
    chosen = [
        {name: given[option] for option, name in names.items() if given.get(option) is not None}
        for names in (own, weights)
    ]
    return Settings(weights=Weights(**chosen[1]), **chosen[0])


class Routing:
    """A model with its samples, ready to train routers for; what was measured and made lies in `folder`.

    Raises BadUsage for an unknown family, one whose timestep cannot be found, and for two denoisers.
    """

    def __init__(
        self, model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], settings: Settings,
        folder: Path,
    ):  # fmt: skip
        self.model, self.family, self.settings = model, family_of_model(model), settings
        self.jobs, self.arguments, self.folder = tuple(jobs), dict(arguments), folder
        if len(denoisers_of(model)) > 1:
            raise BadUsage(
                f"asked to train routers of {model.name}, which has two denoisers; routers are trained for "
                "one. Use --method ditfastattn."
            )
        time_embedder_of(model.pipe.transformer, self.family)
        self.branches: Branches = branches_of(
            settings.coreset, "text" in self.family.token_order, FULLS[settings.full]
        )
        self.routed = Routed(model, self.family)
        self.samples: list[Sample] = []
        self.schedule = Schedule((), (), 1.0)
        self.kept: dict[str, Any] = {}
        self.books: Kept | None = None

    @property
    def sites(self) -> Mapping[str, int]:
        """Self-attention sites and their heads."""
        return self.routed.record.self_attention

    def prepare(self, told: Told) -> None:
        """Make the samples, or take up those that are there."""
        self.books = Kept(self.folder, self._asked())
        self.kept = self.books.values
        self._collect(self.jobs, self.folder, told)

    def look(self) -> None:
        """What compiling given routers needs: the schedule, and what the denoiser is given; keeps nothing."""
        self._collect(self.jobs[:1], None, lambda *_: None)

    def _collect(self, jobs: Sequence[Job], folder: Path | None, told: Told) -> None:
        self.samples, self.schedule = collect(self.model, jobs, self.arguments, folder, told)
        if any(not high > low for high, low in pairwise(self.schedule.levels)):
            raise BadUsage(
                f"asked for a plan by noise level; the levels of this schedule do not fall: "
                f"{list(self.schedule.levels)}. Use another scheduler or fewer steps."
            )

    def keep(self, name: str, value: Any) -> None:
        """Remember something measured: a search that goes on does not measure it again."""
        self.kept[name] = value
        if self.books is not None:
            self.books.keep(name, value)

    def _asked(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": self.model.name,
            "weights": digest_of(denoisers_of(self.model)),
            "arguments": {name: str(value) for name, value in self.arguments.items()},
            "prompts": [f"{job.seed}: {job.prompt}" for job in self.jobs],
            "micro-batches": settings.micro_batches,
            "price": settings.weights.priced,
            "coreset": settings.coreset,
            "full": settings.full,
            "seed": settings.seed,
            # what is annealed falls over all steps: another number of them is another training
            "temperature": (settings.weights.temperature, settings.steps)
            if settings.weights.temperature < 1
            else 1,
        }

    @property
    def trained_for(self) -> dict[str, Any]:
        """What routers are good for, as their file says it."""
        return {"family": self.family.name, "choices": self.branches.choices()}

    def costs(self) -> tuple[float, ...]:
        """Seconds of the branches on this device, as shares of full attention's."""
        if "costs" not in self.kept:
            with self.routed.attached():
                self.keep("costs", measure_costs(self.routed, self.samples[0], self.branches))
        return tuple(self.kept["costs"])

    def train(self, ended: Callable[[], bool], told: Told) -> tuple[Routers, int]:
        """Routers, and the steps that they were trained: fewer than asked where `ended`."""
        settings, costs = self.settings, self.costs()
        with self.routed.attached(), self.routed.recomputed(settings.recompute):
            routers = Routers(self.sites, self._width(), settings.seed)
            objective = Objective(
                self.routed, self.samples, self.schedule, self.branches, settings.weights, costs,
                settings.steps, settings.micro_batches, settings.seed,
            )  # fmt: skip
            config = LoopConfig(
                self.folder, settings.steps, settings.lr, warmup=0, cooldown=0, decay=0.0, save_every=5,
                log_every=1, precision="no", seed=settings.seed, accumulate=settings.micro_batches,
                on_cpu=self.samples[0].clean.device.type == "cpu",
            )  # fmt: skip
            done = train(
                routers, objective.loss, config, make_optimizer=Adam, ended=ended,
                told=lambda step, of, _: told(step, of),
            )  # fmt: skip
        save_routers(self.folder / "routers.safetensors", routers, self.trained_for)
        return routers, done

    def load(self, file: Path) -> Routers:
        """Routers that were trained before."""
        with self.routed.attached():
            return load_routers(file, self.sites, self._width(), self.trained_for)

    def _width(self) -> int:
        return self.routed.embedding(self.samples[0].branches[0]).shape[1]

    @torch.no_grad()
    def table(self, routers: Routers) -> dict[str, np.ndarray]:
        """The scores [T, H, 3] of each site at the noise levels of the schedule."""
        with self.routed.attached():
            embedded = embeddings(self.routed, self.samples[0], self.schedule)
        routers = routers.to(embedded.device)
        return {site: scores.cpu().numpy() for site, scores in routers(embedded).items()}

    def recipe(self, table: Mapping[str, np.ndarray], tau: float | None, name: str = "vorta") -> Recipe:
        """The table as a recipe."""
        made_for = {
            "family": self.family.name,
            "model": self.model.name,
            "steps": len(self.schedule.levels),
            "grid": self.family.grid(self.model.pipe.transformer.config, self.samples[0].branches[0]),
            "scheduler": type(self.model.pipe.scheduler).__name__,
        }
        across = self.routed.record.cross_attention if FULLS[self.settings.full] else ()
        return compile_table(table, self.schedule.levels, self.branches, made_for, tau, name, across)
