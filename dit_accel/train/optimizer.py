"""Muon for every weight that is a matrix (convolutions seen as matrices), AdamW for the rest; an average.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon ; the optimizer is `torch.optim.Muon`.
On the toys' autoencoders it reached in one minute what AdamW alone reached in ten.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Named = Iterable[tuple[str, nn.Parameter]]


class Trainer(Protocol):
    """What the loop asks of an optimizer: one rate, and a state of tensors that a file can hold."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    @property
    def lr(self) -> float: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load_tensors(self, tensors: Mapping[str, Tensor], lr: float) -> None: ...


class MuonAdam(torch.optim.Optimizer):
    """One optimizer outside, two inside; `lr` is AdamW's, Muon's is `muon_factor` times that.

    A weight of more than two axes gets a matrix view as Muon's leaf: it shares the storage, only the gradient
    is handed over at each step.
    """

    def __init__(self, named: Named, lr: float, muon_factor: float = 3.0):
        named = [(name, p) for name, p in named if p.requires_grad]
        super().__init__([p for _, p in named], {"lr": lr})
        self.matrices = [p for name, p in named if _is_matrix(name, p)]
        self.views = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        rest = [p for name, p in named if not _is_matrix(name, p)]
        self.muon_factor = muon_factor
        self.muon = torch.optim.Muon(self.views, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all weights from their `.grad`."""
        lr = self.param_groups[0]["lr"]
        for weight, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
        self.muon.param_groups[0]["lr"] = lr * self.muon_factor
        self.adam.param_groups[0]["lr"] = lr
        self.muon.step()
        self.adam.step()

    @property
    def lr(self) -> float:
        """The learning rate that a schedule has set."""
        return self.param_groups[0]["lr"]

    def tensors(self) -> dict[str, Tensor]:
        """Both inner states, flat: "muon.3.momentum_buffer"."""
        return _flat("muon", self.muon) | _flat("adam", self.adam)

    def load_tensors(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        """The inverse of `tensors`."""
        self.param_groups[0]["lr"] = lr
        _restore("muon", self.muon, tensors)
        _restore("adam", self.adam, tensors)


class Adam(torch.optim.AdamW):
    """AdamW alone, its state as flat tensors."""

    def __init__(self, named: Named, lr: float, weight_decay: float = 0.01):
        super().__init__([p for _, p in named if p.requires_grad], lr=lr, weight_decay=weight_decay)

    @property
    def lr(self) -> float:
        """The learning rate that a schedule has set."""
        return self.param_groups[0]["lr"]

    def tensors(self) -> dict[str, Tensor]:
        """The state, flat: "adam.3.exp_avg"."""
        return _flat("adam", self)

    def load_tensors(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        """The inverse of `tensors`."""
        _restore("adam", self, tensors)
        self.param_groups[0]["lr"] = lr


def _flat(name: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def _restore(name: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, index, entry = key.split(".")
        if owner == name:
            state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _is_matrix(name: str, p: nn.Parameter) -> bool:
    # embeddings, tables and last layers are not maps between hidden spaces: AdamW suits them better
    tables = (
        "embed_tokens",
        "shared",
        "scale_shift_table",
        "relative_attention_bias",
        "proj_out",
        "conv_out",
    )
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) > 4 and not any(word in name for word in tables)


class MovingAverage:
    """Exponential moving average of a module's weights; its horizon grows with the steps, up to `decay`."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards `module`, after step number `step` (from 0)."""
        keep = min(self.decay, (step + 1) / (step + 10))
        for name, weight in module.named_parameters():
            self.weights[name].lerp_(weight, 1 - keep)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes up an earlier average."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the averaged weights into `module`."""
        for name, p in module.named_parameters():
            p.copy_(self.weights[name])
