"""HarmoniCa as a search: what a training of its router needs and leaves behind.

Source: Huang et al. 2024, arXiv:2410.01723. Published are 20 000 steps of AdamW at 0.01 for 10 steps of
sampling on 4 GPUs. Defaults here are for a CPU and a toy: 40 trajectories at a rate of 0.2, which moves an
entry as far as its bounds. The published beta has no scale, since neither lambda nor the error has; without
one it is taken from the slopes of the first trajectory, where it makes a share of the table worth computing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.inventory import describe
from dit_accel.loading import Model
from dit_accel.recipe import Recipe
from dit_accel.search.harmonica.prices import Prices, measure
from dit_accel.search.harmonica.table import compile_table
from dit_accel.search.kept import Kept
from dit_accel.search.saved import digest_of
from dit_accel.search.subject import denoisers_of, look
from dit_accel.search.trajectory import family_of_model
from dit_accel.train.harmonica.ascent import DualAscent
from dit_accel.train.harmonica.objective import Costs, Objective, Rules, first_price
from dit_accel.train.harmonica.router import Router, load_router, save_router
from dit_accel.train.harmonica.student import Student
from dit_accel.train.harmonica.trajectories import Trajectories
from dit_accel.train.loop import LoopConfig, train

GATES = {"published": 1, "hard": 3, "hard-reuse": 2}  # -> choices of an entry
BRANCHES = {"shared": 1, "own": 2}  # -> columns
HALF = 0.5  # of the table is to compute where nobody says how much

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How a router is trained; `published` gates blend, `hard` ones choose, with or without forecasts."""

    gates: str = "published"
    branches: str = "shared"
    steps: int = 40  # of the optimizer: each is `micro_batches` trajectories
    micro_batches: int = 1
    lr: float = 0.2
    beta: float | None = None
    rate: float = 0.5  # of the dual ascent
    rules: Rules = field(default_factory=Rules)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("gates", self.gates, GATES), ("branches", self.branches, BRANCHES)):
            if value not in known:
                raise BadUsage(f'asked for {name} "{value}"; known: {", ".join(known)}. Give one of them.')
        if self.beta is not None and (self.hard or not self.beta > 0):
            raise BadUsage(
                f"asked for --beta {self.beta:g} with {self.gates} gates; it is a number over 0, and the "
                "published gates' alone: hard ones find their price. Leave it out."
            )
        if not self.lr > 0:
            raise BadUsage(f"asked for --lr {self.lr:g}; it must be over 0. Give a greater one.")

    @property
    def hard(self) -> bool:
        """Whether entries choose."""
        return GATES[self.gates] > 1


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Settings by the names of the command's options; what is None or absent is the default."""
    own = {name: name for name in ("gates", "branches", "micro_batches", "lr", "beta")}
    own |= {"steps_of_training": "steps"}
    rules = {"proxy": "proxy", "regenerate": "regenerate"}
    chosen = [
        {name: given[option] for option, name in names.items() if given.get(option) is not None}
        for names in (own, rules)
    ]
    return Settings(rules=Rules(**chosen[1]), **chosen[0])


class Training:
    """A model, ready to train a router for; what was measured and made lies in `folder`.

    Raises BadUsage for an unknown family, one without sublayers, two denoisers, and too few steps.
    """

    def __init__(
        self, model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], settings: Settings,
        folder: Path | None, speedup: float | None = None,
    ):  # fmt: skip
        self.model, self.family, self.settings = model, family_of_model(model), settings
        self.jobs, self.arguments, self.folder, self.speedup = tuple(jobs), dict(arguments), folder, speedup
        if len(denoisers_of(model)) > 1:
            raise BadUsage(
                f"asked to train a router of {model.name}, which has two denoisers; routers are trained for "
                "one. Use --method plan."
            )
        self.sites = describe("transformer", model.pipe.transformer, self.family).sublayers
        if not self.sites:
            raise BadUsage(
                f"asked to train a router of {model.name}; the record of family {self.family.name} names no "
                "sublayers that its blocks have. Give it some, or use --method timeline."
            )
        self.subject = look(model, jobs[:1], arguments)
        self.kept = None if folder is None else Kept(folder, self._asked())
        self._prices: Prices | None = None
        self.student = Student(model.pipe.transformer, self.sites)
        self.trajectories = Trajectories(model, self.family, self.student, arguments)

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels of the schedule."""
        return self.subject.levels

    @property
    def trained_for(self) -> dict[str, Any]:
        """What a router is good for, as its file says it."""
        return {"family": self.family.name, "gates": self.settings.gates, "branches": self.settings.branches}

    def _asked(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "model": self.model.name,
            "weights": digest_of(denoisers_of(self.model)),
            "arguments": {name: str(value) for name, value in self.arguments.items()},
            "prompts": [job.prompt for job in self.jobs],
            "micro-batches": settings.micro_batches,
            "lr": settings.lr,
            "beta": settings.beta,
            "gates": settings.gates,
            "branches": settings.branches,
            "proxy": settings.rules.proxy,
            "regenerate": settings.rules.regenerate,
            "speedup": self.speedup,
            "seed": settings.seed,
        }

    def prices(self) -> Prices:
        """Seconds on this device, measured once."""
        known = self.kept.values.get("prices") if self.kept is not None else None
        if self._prices is None and known is not None:
            self._prices = Prices(known["whole"], tuple(map(tuple, known["sites"])), known["steps"])
        if self._prices is None:
            self._prices = measure(self.subject, self.sites)
            if self.kept is not None:
                self.kept.keep("prices", vars(self._prices))
        return self._prices

    def costs(self, speedup: float) -> Costs:
        """What entries cost, for the budget of a speedup."""
        columns = BRANCHES[self.settings.branches]
        return self.prices().costs(max(2, GATES[self.settings.gates]), columns, speedup)

    def train(self, ended: Callable[[], bool], told: Told) -> tuple[Router, int]:
        """A router, and the steps that it was trained: fewer than asked where `ended`."""
        settings = self.settings
        assert self.folder is not None
        if settings.hard and self.speedup is None:
            raise BadUsage(
                f"asked to train {settings.gates} gates, which keep a budget; no --speedup was given. "
                "Give one, or use --gates published."
            )
        router = Router(
            self.sites, len(self.levels), GATES[settings.gates], BRANCHES[settings.branches], settings.seed
        )
        costs = None if self.speedup is None else self.costs(self.speedup)
        objective = Objective(
            self.trajectories, [job.prompt for job in self.jobs], settings.rules,
            costs if settings.hard else None, settings.micro_batches, settings.seed,
        )  # fmt: skip
        config = LoopConfig(
            self.folder, settings.steps, settings.lr, warmup=0, cooldown=0, decay=0.0, clip=float("inf"),
            save_every=1, log_every=1, precision="no", seed=settings.seed,
            accumulate=settings.micro_batches, on_cpu=self.subject.device.type == "cpu",
        )  # fmt: skip
        with self.student.attached():
            router.log_price.data.fill_(self._first_price(router, objective, costs))
            done = train(
                router, objective.loss, config, make_optimizer=partial(DualAscent, rate=settings.rate),
                told=lambda step, of, _: told(step, of), ended=ended,
            )  # fmt: skip
        save_router(self.folder / "router.safetensors", router, self.trained_for)
        return router, done

    def _first_price(self, router: Router, objective: Objective, costs: Costs | None) -> float:
        """The logarithm of beta, or of the multiplier at first."""
        assert self.kept is not None
        if self.settings.beta is not None:
            return float(torch.tensor(self.settings.beta).log())
        if "log_price" not in self.kept.values:
            router.to(self.subject.device)
            objective.weigh(router, 0)
            slopes, _ = objective.slopes(router, 0)
            share = HALF if costs is None else max(0.0, costs.budget)
            paid = torch.ones(len(self.sites)) if costs is None or not router.hard else costs.choices[:, 0]
            price = first_price(router, slopes, paid, share)
            self.kept.keep("log_price", float(torch.tensor(price).log()))
        return self.kept.values["log_price"]

    def load(self, file: Path) -> Router:
        """A router that was trained before."""
        return load_router(file, self.sites, len(self.levels), self.trained_for)

    def recipe(self, router: Router, tau: float, name: str = "harmonica") -> Recipe:
        """The router as a recipe."""
        return compile_table(router, tau, self.levels, self.subject.made_for, name)
