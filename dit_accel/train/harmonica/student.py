"""The student: a denoiser whose sublayers answer with a mixture of what they compute and what was stored.

Source: HarmoniCa, Huang et al. 2024, arXiv:2410.01723, section 3.1 and its code: the output of a sublayer
before its gate becomes o = (1 - r) o_stored + r o_fresh; where r > tau o itself, detached, is stored, and at
the first step always. Every sublayer computes in training. Ours, as a run will do it: a choice of computing,
reusing and forecasting (order 1 in noise level), and what is stored is what was computed.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dit_accel.methods.reuse.forecast import Forecast
from dit_accel.units import as_tuple

TAU = 0.1  # as published: of training, and of a run
FORECAST = Forecast(order=1)
Value = tuple[Tensor, ...]
Past = tuple[tuple[float, Value], ...]  # noise level and value, newest first


class Student:
    """The sublayers `sites` of a frozen denoiser. Without gates they are the model's own."""

    def __init__(self, module: nn.Module, sites: Sequence[str]):
        self.module, self.sites = module, tuple(sites)
        self.past: dict[tuple[int, str], Past] = {}
        self._gates: dict[str, Tensor] | None = None  # branch -> [sites] or [sites, choices]
        self._level = 0.0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Frozen, its sublayers' outputs led here, while the block of `with` runs."""
        wanted = [parameter.requires_grad for parameter in self.module.parameters()]
        self.module.requires_grad_(False)
        hooks = [
            self.module.get_submodule(site).register_forward_hook(self._hook(number))
            for number, site in enumerate(self.sites)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, want in zip(self.module.parameters(), wanted, strict=True):
                parameter.requires_grad_(want)
            self.forget()

    @contextlib.contextmanager
    def gated(self, gates: dict[str, Tensor], level: float) -> Iterator[None]:
        """Mix by the gates of the branches in a forward at this noise level."""
        self._gates, self._level = gates, level
        try:
            yield
        finally:
            self._gates = None

    def forget(self) -> None:
        """A new trajectory."""
        self.past = {}

    def _hook(self, number: int):
        def mix(module: nn.Module, args: object, output: object) -> object:
            if self._gates is None:
                return None
            value = as_tuple(output)
            halves = [value] if len(self._gates) == 1 else _halves(value)
            pairs = zip(self._gates, halves, strict=True)
            mixed = [self._mix(number, branch, half) for branch, half in pairs]
            whole = mixed[0] if len(mixed) == 1 else tuple(map(torch.cat, zip(*mixed, strict=True)))
            return whole[0] if isinstance(output, Tensor) else whole

        return mix

    def _mix(self, number: int, branch: str, fresh: Value) -> Value:
        key, past = (number, branch), self.past.get((number, branch), ())
        assert self._gates is not None
        if not past:
            self.past[key] = ((self._level, _detached(fresh)),)
            return fresh
        gate = self._gates[branch][number].to(fresh[0].dtype)
        if gate.ndim == 0:
            out = tuple((1 - gate) * old + gate * new for old, new in zip(past[0][1], fresh, strict=True))
            if gate.item() > TAU:
                self.past[key] = ((self._level, _detached(out)),)
            return out
        if gate[0].item() == 1:
            self.past[key] = ((self._level, _detached(fresh)), past[0])
        ways = (fresh, past[0][1], self._forecast(past))[: len(gate)]
        return tuple(
            torch.stack([g * one for g, one in zip(gate, each, strict=True)]).sum(0)
            for each in zip(*ways, strict=True)
        )

    def _forecast(self, past: Past) -> Value:
        levels, values = zip(*past, strict=True)
        weights = FORECAST.weights(self._level, levels)
        return tuple(
            sum((w * one for w, one in zip(weights, each, strict=True)), start=torch.zeros_like(each[0]))
            for each in zip(*values, strict=True)
        )


def _halves(value: Value) -> list[Value]:
    """A batched pair's uncond and cond halves."""
    chunks = [each.chunk(2) for each in value]
    return [tuple(chunk[index] for chunk in chunks) for index in range(2)]


def _detached(value: Value) -> Value:
    return tuple(each.detach() for each in value)
