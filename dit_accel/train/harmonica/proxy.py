"""What a step's caching does to the final latents, without a gradient: the weights of the steps' losses.

Source: the image error proxy (IEPO) of HarmoniCa, Huang et al. 2024, arXiv:2410.01723, section 4.3.
With x0^(M) the final latents of one noise when the router answers at the steps in M and the model elsewhere:

    paper   lambda_i = |x0^(all) - x0^(all but i)|^2
    code    lambda_i = mean((x0^(1..i) - x0^(1..i-1))^2): what step i adds, in sampling order

T generations each. The first steps of one are those of another: their outputs are known. Where the router
forecasts, `paper` makes them again, since what is stored then depends on more than the last step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.compare import Job
from dit_accel.train.harmonica.router import Router
from dit_accel.train.harmonica.trajectories import DENSE, Gates, Trajectories

PROXIES = ("code", "paper")
Told = Callable[[int, int], None]


@torch.no_grad()
def step_weights(kind: str, trajectories: Trajectories, router: Router, gates: Gates, job: Job) -> Tensor:
    """lambda [T] of one noise; that of the first step, which computes in any case, is 0.

    `gates` must give the same for a step whenever it is asked.
    """
    find = _marginal if kind == "code" else _spared
    found = torch.zeros_like(router.weights)
    for step, error in find(trajectories, router, gates, job).items():
        found[step] = error
    return found


def _marginal(trajectories: Trajectories, router: Router, gates: Gates, job: Job) -> dict[int, Tensor]:
    last, _ = trajectories.latents(router, lambda _: DENSE, job)
    whole, outputs = trajectories.latents(router, gates, job)
    errors: dict[int, Tensor] = {}
    for step in range(1, router.steps):
        own = whole
        if step < router.steps - 1:
            own, _ = trajectories.latents(router, lambda _: DENSE, job, known=outputs, before=step + 1)
        errors[step] = (own - last).square().mean()
        last = own
    return errors


def _spared(trajectories: Trajectories, router: Router, gates: Gates, job: Job) -> dict[int, Tensor]:
    whole, outputs = trajectories.latents(router, gates, job)
    errors: dict[int, Tensor] = {}
    for step in range(1, router.steps):
        again = router.choices > 2
        own, _ = trajectories.latents(
            router,
            lambda at, step=step: computing(router) if at == step else gates(at),
            job,
            known=None if again else outputs,
            before=0 if again else step,
        )
        errors[step] = (own - whole).square().sum()
    return errors


def computing(router: Router) -> Tensor:
    """Gates of a step at which everything computes."""
    ones = torch.ones(router.columns, len(router.sites), device=router.table.device)
    if not router.hard:
        return ones
    return torch.nn.functional.one_hot(torch.zeros_like(ones, dtype=torch.long), router.choices).to(ones)
