"""How an error of an attention's output moves the predicted velocity, layer by layer and channel by channel.

To first order an error e of a module's output moves the velocity by J e, with J the model's own derivative:
gates, later layers and the output projection are in it. For random signs r, E |r . J e|^2 = |J e|^2, so one
backward of r . v gives an unbiased look at the rows of J^T J; its diagonal, averaged over tokens, is kept:

    |J e|^2  ~  sum_c M_c sum_n e_nc^2,        M_c = mean_n E_r (J^T r)_nc^2
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dit_accel.search.calls import Arguments, Steps, by_name
from dit_accel.search.forwards import tensor_of

PROBES = 2  # backwards for each forward looked at
LOOKS = 5  # noise levels looked at; between them M is interpolated in its logarithm

Channels = Sequence[np.ndarray]  # one [C] for each stream that a module returns


@dataclass(frozen=True)
class Call:
    """One forward of a denoiser that a pipeline made."""

    step: int
    branch: str  # "cond", "uncond", or "both": one batch that holds [uncond, cond]
    arguments: Arguments


def looked_at(steps: int) -> list[int]:
    """Evenly spread steps, both ends among them."""
    return sorted({round(step) for step in np.linspace(0, steps - 1, min(LOOKS, steps))})


def sensitivities(
    module: nn.Module, sites: Sequence[str], calls: Sequence[Call], seed: int = 0
) -> dict[tuple[str, str, int], Channels]:
    """M of each (site, branch, step) of `calls`. The model must have nothing installed on it."""
    found: dict[tuple[str, str, int], Channels] = {}
    noise = torch.Generator().manual_seed(seed)
    with _frozen(module):
        for call in calls:
            for site, moved in _looks(module, sites, call, noise).items():
                halves = {call.branch: slice(None)} if call.branch != "both" else {
                    "uncond": slice(0, len(moved[0]) // 2), "cond": slice(len(moved[0]) // 2, None)
                }  # fmt: skip
                for branch, half in halves.items():
                    found[site, branch, call.step] = tuple(
                        (stream[half].mean((0, 1)) / PROBES).numpy() for stream in moved
                    )
    return found


def _looks(
    module: nn.Module, sites: Sequence[str], call: Call, noise: torch.Generator
) -> dict[str, list[Tensor]]:
    """The squares of J^T r [B, N, C] of every stream of every site, summed over the probes."""
    with torch.enable_grad(), _additions(module, sites) as added:
        output = tensor_of(module(**call.arguments))
        latent = call.arguments["hidden_states"]
        output = output[:, : latent.shape[1]] if output.ndim == latent.ndim >= 4 else output
        streams = [stream for site in sites for stream in added[site]]
        sums = [torch.zeros(stream.shape, dtype=torch.float64) for stream in streams]
        for probe in range(PROBES):
            signs = torch.randint(0, 2, output.shape, generator=noise).to(output) * 2 - 1
            # the last layer's text moves nothing: it has no gradient at all
            again = probe + 1 < PROBES
            grads = torch.autograd.grad(output, streams, signs, retain_graph=again, allow_unused=True)
            for total, grad in zip(sums, grads, strict=True):
                if grad is not None:
                    total += grad.detach().cpu().double().square()
    left = iter(sums)
    return {site: [next(left) for _ in added[site]] for site in sites}


@contextlib.contextmanager
def _additions(module: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """While it is open every site's outputs have a zero added that wants a gradient."""
    added: dict[str, list[Tensor]] = {site: [] for site in sites}

    def add(site: str, output: Any) -> Any:
        streams = output if isinstance(output, tuple) else (output,)
        zeros = [torch.zeros_like(stream).requires_grad_() for stream in streams]
        added[site] = zeros
        moved = tuple(stream + zero for stream, zero in zip(streams, zeros, strict=True))
        return moved if isinstance(output, tuple) else moved[0]

    hooks = [
        module.get_submodule(site).register_forward_hook(lambda _m, _a, out, site=site: add(site, out))
        for site in sites
    ]
    try:
        yield added
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Parameters want no gradient while it is open."""
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def recording(
    modules: Mapping[str, nn.Module], steps: Sequence[int], batched: bool
) -> Iterator[dict[str, list[Call]]]:
    """Notes the calls that a pipeline makes of its denoisers at some of its steps, in order."""
    found: dict[str, list[Call]] = {name: [] for name in modules}
    count = Steps()

    def note(component: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        arguments = by_name(module, args, kwargs)
        step = count.of(arguments)
        if step in steps:
            branch = "both" if batched else "cond" if count.began else "uncond"
            kept = {name: _copy(value) for name, value in arguments.items()}
            found[component].append(Call(step, branch, kept))

    hooks = [
        module.register_forward_pre_hook(functools.partial(note, component), with_kwargs=True)
        for component, module in modules.items()
    ]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def between(known: Mapping[int, Channels], steps: int) -> list[Channels]:
    """M at every step, from those looked at."""
    places = sorted(known)
    streams = range(len(known[places[0]]))
    tables = [np.log(np.maximum(np.stack([known[step][s] for step in places]), 1e-30)) for s in streams]
    return [
        tuple(np.exp([np.interp(step, places, column) for column in table.T]) for table in tables)
        for step in range(steps)
    ]
