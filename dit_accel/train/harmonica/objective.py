"""What the router is trained to: near to the teacher at every step of its own trajectory, and cheap.

Source: HarmoniCa, Huang et al. 2024, arXiv:2410.01723, sections 4.2 and 4.3:

    L_i = lambda_i mean((eps*_i - eps_i)^2) + beta sum_s r_is         for the steps i after the first

`hard` (ours): the error is divided by mean(eps*^2) and lambda by its mean, choices are drawn, and computing
costs measured seconds:

    L = sum_i lambda_i / mean(lambda) |eps*_i - eps_i|^2 / |eps*_i|^2 + mu (cost - budget)

with log mu rising by what is expected to be spent over the budget. A choice's slope is that of its 0 or 1
and goes to its probability (straight through). A micro-batch is a whole trajectory: the published gradient of
a row comes from its own step alone, so the steps of one need not wait for each other's update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.train.harmonica.proxy import PROXIES, step_weights
from dit_accel.train.harmonica.router import Router
from dit_accel.train.harmonica.trajectories import Gates, Trajectories

SEEDS = 2**31


@dataclass(frozen=True)
class Costs:
    """Seconds of a site's answers as shares of all that computes in a run.

    `choices` is [sites, choices] for one step and column; where all compute, all of it sums to 1.
    """

    choices: Tensor
    budget: float  # the share that may be spent

    def of(self, probabilities: Tensor) -> Tensor:
        """The share that [columns, T, sites, choices] spend."""
        shares = self.choices.to(probabilities.device)
        return (probabilities.to(shares) * shares).sum()


@dataclass(frozen=True)
class Rules:
    """How errors are weighed."""

    proxy: str = "code"
    regenerate: int = 10  # steps of the optimizer, each of which is one or more trajectories

    def __post_init__(self) -> None:
        if self.proxy not in PROXIES:
            raise BadUsage(f'asked for the proxy "{self.proxy}"; known: {", ".join(PROXIES)}. Give one.')
        if self.regenerate < 1:
            raise BadUsage(f"asked to regenerate every {self.regenerate} steps; it must be 1 or more.")


class Objective:
    """The loss of a router; `prompts` are drawn, each time with a new noise."""

    def __init__(
        self, trajectories: Trajectories, prompts: Sequence[str], rules: Rules, costs: Costs | None,
        accumulate: int = 1, seed: int = 0,
    ):  # fmt: skip
        self.trajectories, self.prompts, self.rules, self.costs = trajectories, prompts, rules, costs
        self.accumulate, self.seed = accumulate, seed
        self._weighed: int | None = None  # the optimizer's step at which lambda was last found

    def loss(self, module: nn.Module, number: int) -> tuple[Tensor, dict[str, float]]:
        """A loss whose gradient is that of the trajectory's losses, and what it is made of."""
        assert isinstance(module, Router)
        self.weigh(module, number // self.accumulate)
        slopes, errors = self.slopes(module, number)
        scores = module.scores()
        loss = torch.stack([(slope * scores[:, step]).sum() for step, slope in slopes.items()]).sum()
        price, numbers = self._price(module, scores)
        return loss + price, numbers | {"error": sum(errors.values()) / len(errors)}

    def slopes(self, router: Router, number: int) -> tuple[Mapping[int, Tensor], Mapping[int, float]]:
        """By step: the slope of lambda_i error_i by the gates, and the error."""
        errors: dict[int, float] = {}
        weights = router.weights / router.weights.mean() if router.hard else router.weights

        def error(step: int, own: Tensor, teacher: Tensor) -> Tensor:
            found = (own.float() - teacher.float()).square().mean()
            if router.hard:
                found = found / teacher.float().square().mean()
            errors[step] = found.item()
            return weights[step] * found

        gates = drawn_gates(router, self.seed, number)
        return self.trajectories.train(router, gates, self.job(number), error), errors

    def job(self, number: int) -> Job:
        """The prompt and the noise of a micro-batch."""
        rng = np.random.default_rng([self.seed, number])
        return Job(self.prompts[int(rng.integers(len(self.prompts)))], int(rng.integers(SEEDS)))

    def weigh(self, router: Router, step: int) -> None:
        """Every so many steps of the optimizer lambda is found anew: the same in every process."""
        if step % self.rules.regenerate or self._weighed == step:
            return
        number = step * self.accumulate
        gates = drawn_gates(router, self.seed, number)
        found = step_weights(self.rules.proxy, self.trajectories, router, gates, self.job(number))
        # a router that changes nothing has no say in which step matters
        router.weights.data.copy_(found if found.sum() > 0 else torch.ones_like(found))
        self._weighed = step

    def _price(self, router: Router, scores: Tensor) -> tuple[Tensor, dict[str, float]]:
        price = router.log_price.exp()
        told = {"log_price": router.log_price.item()}
        if self.costs is None:
            later = scores[:, 1:]
            return price * later.sum(), told | {"computing": later.mean().item()}
        first = scores.detach()[:, :1]  # computes in any case
        spent = self.costs.of(torch.cat([first, scores[:, 1:]], 1))
        # the multiplier climbs where the table descends
        climbing = -router.log_price * (spent.detach() - self.costs.budget)
        told |= {"spent": spent.item(), "computing": scores[:, 1:, :, 0].mean().item()}
        return price.detach() * spent + climbing - climbing.detach(), told


def drawn_gates(router: Router, seed: int, number: int) -> Gates:
    """The gates of a trajectory: the same for a step whenever they are asked for."""

    def gates(step: int) -> Tensor:
        mixed = int(np.random.default_rng([seed, number, step]).integers(SEEDS))
        return router.gates(step, torch.Generator().manual_seed(mixed))

    return gates


def first_price(router: Router, slopes: Mapping[int, Tensor], costs: Tensor, share: float) -> float:
    """The price of computing at which, by the slopes of one trajectory, this share of the cost is worth it.

    `costs` [sites] are those of computing. A site's worth is how much the error falls where it computes.
    """
    stacked = torch.stack(list(slopes.values()), 1)  # [columns, T - 1, sites] or [..., choices]
    worth = stacked[..., 1:].amin(-1) - stacked[..., 0] if router.hard else -stacked
    every = (worth.clamp_min(0) / costs.to(worth)).flatten()
    order = every.argsort(descending=True)
    spent = costs.to(worth).expand_as(worth).flatten()[order].cumsum(0)
    place = int((spent <= share * spent[-1]).sum())
    price = float(every[order[min(place, len(order) - 1)]])
    least = every[every > 0]
    return price if price > 0 else float(least.min()) if len(least) else 1.0
