"""The router: for every step and sublayer how much it computes. It sees no features, so it is a table.

Source: HarmoniCa, Huang et al. 2024, arXiv:2410.01723, section 4.1 and its code. `soft`, as published:
r = sigmoid(p), p from a normal distribution. `hard` (ours): a softmax over compute, reuse and forecast.
The first step always computes. A column serves both branches, or one each.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_accel.errors import BadUsage
from dit_accel.timeline import BRANCHES

LETTERS = "CrP"  # compute, reuse, forecast: the order of a hard router's scores
FORMAT = "dit_accel harmonica router"
CERTAIN = 5.0  # the table is kept between this and its negative


class Router(nn.Module):
    """`table` is [columns, T, sites] (soft) or [columns, T, sites, choices] (hard)."""

    def __init__(self, sites: Sequence[str], steps: int, choices: int = 1, columns: int = 1, seed: int = 0):
        super().__init__()
        self.sites, self.steps, self.choices, self.columns = tuple(sites), steps, choices, columns
        shape = (columns, steps, len(self.sites))
        if self.hard:
            start = torch.zeros(*shape, choices)
            start[..., 0] = 1.0  # every choice is drawn often, computing most often
            start[:, 0, :, 0] = CERTAIN
        else:
            start = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            start[:, 0] = CERTAIN
        self.table = nn.Parameter(start)
        # parameters, so that a checkpoint holds them: the weights of the steps' errors, and what computing
        # costs in the loss (published: beta, fixed; hard: a multiplier that rises over the budget)
        self.weights = nn.Parameter(torch.ones(steps), requires_grad=False)
        self.log_price = nn.Parameter(torch.zeros(()), requires_grad=self.hard)

    @property
    def hard(self) -> bool:
        """Whether it chooses between ways, or blends two."""
        return self.choices > 1

    def scores(self) -> Tensor:
        """r [columns, T, sites], or the probabilities [columns, T, sites, choices]."""
        return self.table.softmax(-1) if self.hard else self.table.sigmoid()

    def gates(self, step: int, drawn: torch.Generator) -> Tensor:
        """What a step of the student does: r [columns, sites], or one choice of each, drawn, as 0 and 1."""
        scores = self.scores()[:, step].detach()
        if not self.hard:
            return scores
        picks = torch.multinomial(scores.flatten(0, 1).cpu(), 1, generator=drawn)[:, 0]
        one = nn.functional.one_hot(picks, self.choices).to(scores)
        return one.view_as(scores)

    def column(self, branch: str) -> int:
        """The column of a branch."""
        return BRANCHES.index(branch) if self.columns > 1 else 0


def certainty(router: Router) -> Tensor:
    """[columns, T, sites] in (0, 1): r, or how much computing is preferred to the best other choice."""
    if not router.hard:
        return router.scores().detach()
    table = router.table.detach()
    return (table[..., 0] - table[..., 1:].amax(-1)).sigmoid()


def save_router(file: Path, router: Router, told: Mapping[str, Any]) -> None:
    """Writes the table in half precision, and the weights of the steps; `told` becomes metadata."""
    tensors = {"table": router.table.detach().half().cpu(), "weights": router.weights.detach().cpu()}
    metadata = {"format": FORMAT, "told": json.dumps({"sites": router.sites, **told})}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file.with_suffix(".tmp"), metadata=metadata)
    file.with_suffix(".tmp").replace(file)


def load_router(file: Path, sites: Sequence[str], steps: int, told: Mapping[str, Any]) -> Router:
    """The router of a file that `save_router` wrote.

    Raises BadUsage where it is no such file, and where it is of other sites, steps or settings (`told`).
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BadUsage(f"asked to use the router in {file}; it is not one of ours. Give another.")
            table, weights = opened.get_tensor("table"), opened.get_tensor("weights")
    except (OSError, SafetensorError) as error:
        raise BadUsage(
            f"asked to use the router in {file}; it cannot be read as safetensors ({error}). Give another."
        ) from error
    found = json.loads(metadata["told"]) | {"steps": table.shape[1]}
    wanted = json.loads(json.dumps({"sites": tuple(sites), **told})) | {"steps": steps}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise BadUsage(
                f"asked to use the router in {file} with {key} {value}; it was trained with {key} "
                f"{found.get(key)}. Ask for that, or train another."
            )
    router = Router(sites, steps, table.shape[3] if table.ndim == 4 else 1, table.shape[0])
    with torch.no_grad():
        router.table.copy_(table)
        router.weights.copy_(weights)
    return router
