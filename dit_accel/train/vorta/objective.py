"""What the routers are trained to: near to the original model, and cheap.

Source: VORTA, Sun et al. 2025, arXiv:2505.18809. All branches run and are mixed by the routers' scores a:

    loss = w_fm |v - v*|^2 + w_d |v - v_original|^2 + w_r sum over layers of a price

`published` price: mean over heads of a_full^2, which pushes full attention down and does not ask which of
the others is cheaper. `latency` (ours): mean over heads of sum_i a_i c_i, the expected seconds of a head as
a share of full attention's, c_i measured on this device with the kernels of a run. A step of the optimizer
draws one fifth of the noise levels; in the least noisy one w_fm is 0 and w_d doubled, as published. With a
`temperature` below 1 the softmax grows harder over the training, so that it ends near the argmax of a run.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_accel.errors import BadUsage, Slower
from dit_accel.stages import now
from dit_accel.train.vorta.branches import Branches, mix
from dit_accel.train.vorta.routed import Routed, time_embedder_of
from dit_accel.train.vorta.samples import Sample, Schedule, noised

PRICES = ("published", "latency")
FIFTHS = 5
TIMED = 20  # calls of a branch, after one to warm up


@dataclass(frozen=True)
class Weights:
    """Weights of the loss, as published, and how hard the softmax is at the end."""

    flow: float = 1.0
    distil: float = 20.0
    price: float = 0.02
    priced: str = "published"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.priced not in PRICES:
            raise BadUsage(f'asked for the price "{self.priced}"; known: {", ".join(PRICES)}. Give one.')
        if not 0 < self.temperature <= 1:
            raise BadUsage(
                f"asked to end at temperature {self.temperature:g}; it must be over 0 and at most 1, where "
                "nothing is annealed. Ask for another."
            )


@dataclass(frozen=True)
class Draw:
    """What a micro-batch is made of: `time` in [0, 1) of the training's, and a sample's branch."""

    time: float
    sample: int
    branch: int
    least_noisy: bool


def draw(number: int, accumulate: int, samples: Sequence[Sample], seed: int) -> Draw:
    """Micro-batch `number`: all of one step are in one fifth of the noise levels."""
    fifth = int(np.random.default_rng([seed, number // accumulate]).integers(FIFTHS))
    rng = np.random.default_rng([seed, 1, number])
    moment = (fifth + rng.random()) / FIFTHS
    sample = int(rng.integers(len(samples)))
    return Draw(moment, sample, int(rng.integers(len(samples[sample].branches))), fifth == 0)


class Objective:
    """The loss of routers on samples; `costs` are those of the branches, full first, as shares of full."""

    def __init__(
        self, routed: Routed, samples: Sequence[Sample], schedule: Schedule, branches: Branches,
        weights: Weights, costs: Sequence[float], steps: int, accumulate: int, seed: int = 0,
    ):  # fmt: skip
        self.routed, self.samples, self.schedule, self.branches = routed, samples, schedule, branches
        self.weights, self.costs, self.seed = weights, tuple(costs), seed
        self.steps, self.accumulate = steps, accumulate
        self.scheduler: Any = routed.pipe.scheduler

    def loss(self, routers: nn.Module, number: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of micro-batch `number`, and its parts."""
        drawn = draw(number, self.accumulate, self.samples, self.seed)
        sample = self.samples[drawn.sample]
        arguments, answer = self._noisy(sample, drawn)
        with torch.no_grad():
            original = self.routed.forward(arguments).float()
        output, scores = self._mixed(routers, arguments, self.temperature(number // self.accumulate))
        # a model that also predicts its variance answers in its first channels
        output, original = (x.split(answer.shape[1], dim=1)[0] for x in (output.float(), original))
        flow, distil = (output - answer).square().mean(), (output - original).square().mean()
        priced = self._price(scores)
        w = self.weights
        low = drawn.least_noisy
        loss = (0.0 if low else w.flow) * flow + (2 if low else 1) * w.distil * distil + w.price * priced
        means = torch.stack([each.mean((0, 1)) for each in scores.values()]).mean(0).tolist()
        numbers = {"loss": loss.item(), "distil": distil.item(), "flow": flow.item(), "price": priced.item()}
        return loss, numbers | dict(zip(("full", "coreset", "tile"), means, strict=True))

    def temperature(self, step: int) -> float:
        """Of the softmax at a step: falls from 1, by equal factors, to the one of `weights`."""
        return self.weights.temperature ** (step / max(1, self.steps - 1))

    def _noisy(self, sample: Sample, drawn: Draw) -> tuple[dict[str, Any], Tensor]:
        """The denoiser's arguments at the drawn noise level, and what it should answer."""
        noise = torch.randn(sample.clean.shape).to(sample.clean)  # drawn on the CPU: the same on any device
        given = sample.branches[drawn.branch]
        noisy, timestep, answer = noised(self.scheduler, sample.clean, noise, drawn.time)
        given = given | {"hidden_states": noisy.to(given["hidden_states"].dtype)}
        return at_time(given, timestep, self.schedule), answer.float()

    def _mixed(
        self, routers: nn.Module, arguments: dict[str, Any], temperature: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of all branches mixed, and the scores [1, H, 3] of each site."""
        scores: dict[str, Tensor] = {}

        def ask(module: nn.Module, args: Any, output: Tensor) -> None:
            scores.update(routers(output.detach(), temperature))

        hook = time_embedder_of(self.routed.module, self.routed.family).register_forward_hook(ask)
        try:
            output = self.routed.forward(
                arguments, lambda site, visit: mix(visit, self.branches, scores[site])
            )
        finally:
            hook.remove()
        return output, scores

    def _price(self, scores: Mapping[str, Tensor]) -> Tensor:
        if self.weights.priced == "published":
            return torch.stack([each[..., 0].square().mean() for each in scores.values()]).sum()
        return torch.stack([(each @ each.new_tensor(self.costs)).mean() for each in scores.values()]).sum()


def at_time(arguments: Mapping[str, Any], timestep: float, schedule: Schedule) -> dict[str, Any]:
    """The same arguments at another timestep of the scheduler."""
    given = arguments["timestep"]
    value = timestep * schedule.scale
    return {
        **arguments,
        "timestep": torch.full_like(given, value if given.is_floating_point() else round(value)),
    }


def embeddings(routed: Routed, sample: Sample, schedule: Schedule) -> Tensor:
    """The embedded timesteps [T, E] of a schedule."""
    found = [
        routed.embedding(at_time(sample.branches[0], timestep, schedule)) for timestep in schedule.timesteps
    ]
    return torch.cat(found)


@torch.no_grad()
def measure_costs(routed: Routed, sample: Sample, branches: Branches) -> tuple[float, ...]:
    """Seconds of each branch as a share of full attention's, for all heads of one layer.

    The least of many calls, taken by turns.
    Tokens are said to stand in brick order, as they do in a run. A branch that would run dense there costs 1.
    """
    seconds: list[float] = []

    def serve(site: str, visit: Any) -> Tensor:
        if not seconds:
            rounds = [[_seconds_of(method, visit) for method in branches.methods] for _ in range(1 + TIMED)]
            seconds.extend(min(times) for times in zip(*rounds[1:], strict=True))
        return visit.dense()

    brick = branches.tile.brick_on(routed.family.grid(routed.module.config, sample.branches[0]))
    routed.forward(sample.branches[0], serve, brick)
    full = seconds[0]
    return tuple(1.0 if math.isinf(each) else each / full for each in seconds)


def _seconds_of(method: Any, visit: Any) -> float:
    began = seconds_on(visit.q.device)
    try:
        method.attend(visit)
    except Slower:
        return math.inf
    return seconds_on(visit.q.device) - began


def seconds_on(device: torch.device) -> float:
    """A clock. On a CPU the processor's: others that run there stretch long calls, and short ones not."""
    return time.process_time() if device.type == "cpu" else now()
