"""What sublayers cost: seconds of each in a dense generation, and of answering with what is stored."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import BadUsage
from dit_accel.generate import generate
from dit_accel.search.subject import Subject
from dit_accel.train.harmonica.objective import Costs
from dit_accel.train.vorta.objective import seconds_on
from dit_accel.units import as_tuple
from dit_accel_kernels.history_mix import history_mix

MIXES = 3  # timed, the least counts


@dataclass(frozen=True)
class Prices:
    """Seconds: of a dense generation, and by site of one step's computing, reusing and forecasting."""

    whole: float
    sites: tuple[tuple[float, float, float], ...]
    steps: int

    @property
    def computing(self) -> float:
        """Of all sublayers at all steps."""
        return self.steps * sum(site[0] for site in self.sites)

    @property
    def most(self) -> float:
        """The speedup where the first step alone computes."""
        first, later = (sum(site[kind] for site in self.sites) for kind in (0, 1))
        return self.whole / (self.whole - self.computing + first + (self.steps - 1) * later)

    def budget(self, speedup: float) -> float:
        """The share of the sublayers' seconds that a run so many times faster may spend."""
        return (self.whole / speedup - (self.whole - self.computing)) / self.computing

    def costs(self, choices: int, columns: int, speedup: float) -> Costs:
        """Costs for a budget; BadUsage where sublayers take too little of a run."""
        if speedup >= self.most:
            raise BadUsage(
                f"asked for --speedup {speedup:g}; sublayers take {self.computing / self.whole:.0%} of a "
                f"generation here, and where the first step alone computes it is {self.most:.2f} times "
                "faster. Ask for less."
            )
        shares = torch.tensor(self.sites)[:, :choices] / self.computing / columns
        return Costs(shares, self.budget(speedup))


def measure(subject: Subject, sites: Sequence[str]) -> Prices:
    """Time one dense generation; on a CPU the processor's clock, which others that run there do not move."""
    device, job = subject.device, subject.jobs[0]
    spent: dict[str, list[float]] = {site: [] for site in sites}
    mixed: dict[str, tuple[float, float]] = {}
    began: dict[str, float] = {}
    hooks: list[Any] = []

    def start(site: str) -> Any:
        def note(*_: Any) -> None:
            began[site] = seconds_on(device)

        return note

    def stop(site: str) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            spent[site].append(seconds_on(device) - began[site])

        return note

    def mix(site: str) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            mixed[site] = tuple(  # pyright: ignore[reportArgumentType]
                sum(_mix_seconds(each, count, device) for each in as_tuple(output)) for count in (1, 2)
            )
            handles[site].remove()

        return note

    module = subject.model.pipe.transformer
    handles = {site: module.get_submodule(site).register_forward_hook(mix(site)) for site in sites}
    steps = len(subject.levels)
    # a short run tells what mixing takes, and warms up; some schedules have no single step
    generate(subject.model, job.prompt, {**subject.arguments, "num_inference_steps": 2}, job.seed)
    for site in sites:
        child = module.get_submodule(site)
        hooks += [child.register_forward_pre_hook(start(site)), child.register_forward_hook(stop(site))]
    try:
        at = seconds_on(device)
        generate(subject.model, job.prompt, subject.arguments, job.seed)
        whole = seconds_on(device) - at
    finally:
        for hook in hooks:
            hook.remove()
    calls = len(next(iter(spent.values()))) // steps
    found = [(median(spent[site]) * calls, *(calls * one for one in mixed[site])) for site in sites]
    return Prices(whole, tuple(found), steps)  # pyright: ignore[reportArgumentType]


def _mix_seconds(value: Tensor, count: int, device: torch.device) -> float:
    stored = [value.clone() for _ in range(count)]
    weights = [1.0] if count == 1 else [1.5, -0.5]
    least = float("inf")
    for _ in range(MIXES):
        began = seconds_on(device)
        history_mix(stored, weights, x=None, scales=[None] * count, dtype=None)
        least = min(least, seconds_on(device) - began)
    return least
