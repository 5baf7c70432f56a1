"""A trained router as a recipe: one letter for each step, sublayer and branch; nothing is asked in a run.

Source: HarmoniCa, Huang et al. 2024, arXiv:2410.01723: computes where r > tau, published tau = 0.1. Where a
speedup is wanted (ours) tau is the one at which the measured seconds of what computes meet its budget.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dit_accel.recipe import Recipe
from dit_accel.search.rows import recipe_of_rows
from dit_accel.timeline import BRANCHES
from dit_accel.train.harmonica.objective import Costs
from dit_accel.train.harmonica.router import LETTERS, Router, certainty
from dit_accel.train.harmonica.student import TAU

EVEN = 0.5  # tau of a hard router: its likeliest choice


def published_tau(router: Router) -> float:
    """The threshold by which a router was trained."""
    return EVEN if router.hard else TAU


def picks(router: Router, tau: float) -> np.ndarray:
    """The index in LETTERS of each entry, [columns, T, sites]; all of the first step compute."""
    others = 1 + router.table.detach()[..., 1:].argmax(-1) if router.hard else 1
    found = torch.where(certainty(router) > tau, torch.zeros((), dtype=torch.long), others)
    found[:, 0] = 0
    return found.cpu().numpy()


def spent(router: Router, tau: float, costs: Costs) -> float:
    """The share of the sublayers' seconds that a threshold spends."""
    found = torch.from_numpy(picks(router, tau))
    return costs.of(torch.nn.functional.one_hot(found, costs.choices.shape[1])).item()


def tau_within(router: Router, costs: Costs) -> float:
    """The least threshold whose entries cost no more than the budget; between entries, not on one."""
    levels = certainty(router)[:, 1:].flatten().unique().tolist()
    taus = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), 1.0]
    low, high = 0, len(taus) - 1
    while low < high:
        middle = (low + high) // 2
        if spent(router, taus[middle], costs) <= costs.budget:
            high = middle
        else:
            low = middle + 1
    return taus[low]


def compile_table(
    router: Router, tau: float, levels: Sequence[float], made_for: Mapping[str, Any], name: str = "harmonica"
) -> Recipe:
    """The recipe of a router at falling noise levels [T]."""
    found = picks(router, tau)
    rows = {
        branch: {
            ("transformer", site): "".join(LETTERS[pick] for pick in found[router.column(branch), :, number])
            for number, site in enumerate(router.sites)
        }
        for branch in BRANCHES
    }
    age = {"max_age": router.steps}
    choices = {
        "C": {"method": "compute"},
        "r": {"method": "reuse", **age},
        "P": {"method": "forecast", "order": 1, **age},
    }
    return recipe_of_rows({}, rows, choices, levels, made_for, name)
