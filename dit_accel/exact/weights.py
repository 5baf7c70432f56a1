"""The weights behind the tables: whether they changed, and where they lie."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel import compat

_SAMPLE = 64  # elements of each weight that are compared when a run starts
_ADAPTER = ("active_adapters", "merged_adapters", "disable_adapters")  # public names of peft's layers


@dataclass(frozen=True)
class Child:
    """A submodule by its place: adapters put another module there."""

    path: str
    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return getattr(self.parent, self.name)


def children(root: nn.Module, pattern: str) -> list[Child]:
    """The submodules a name means; * stands for each index of a ModuleList, absent ones are left out."""
    paths = [pattern]
    if ".*." in pattern:
        items, _, rest = pattern.partition(".*.")
        paths = [f"{items}.{index}.{rest}" for index in range(len(root.get_submodule(items)))]  # pyright: ignore
    found: list[Child] = []
    for path in paths:
        parent_path, _, name = path.rpartition(".")
        try:
            parent = root.get_submodule(parent_path)
        except AttributeError:
            continue
        if isinstance(getattr(parent, name, None), nn.Module):
            found.append(Child(path, parent, name))
    return found


def stamp(modules: Iterable[nn.Module]) -> list[Any]:
    """Identity and version of all weights, and the state of adapters on them."""
    marks: list[Any] = []
    for module in modules:
        if type(module) is nn.Linear:  # nearly all of them, once per forward: no generators here
            weight, bias = module.weight, module.bias
            marks += (id(module), id(weight), compat.version_of(weight))
            marks += () if bias is None else (id(bias), compat.version_of(bias))  # pyright: ignore
            continue
        for part in module.modules():
            marks += (id(part), *(str(getattr(part, name, "")) for name in _ADAPTER))
            marks.append(str(getattr(part, "scaling", "")))
        marks += ((id(weight), compat.version_of(weight)) for weight in module.parameters())
    return marks


def sample(modules: Iterable[nn.Module]) -> list[bytes]:
    """Some elements of every weight: fusing by `weight.data += x` leaves identity and version."""
    picked: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, weight in enumerate(_weights(modules)):
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].contiguous().view(torch.uint8)
        picked.setdefault(weight.device, []).append((place, some))
    found: dict[int, bytes] = {}
    for parts in picked.values():  # one wait per device
        whole = torch.cat([some for _, some in parts]).cpu().numpy().tobytes()
        for place, some in parts:
            found[place], whole = whole[: some.numel()], whole[some.numel() :]
    return [found[place] for place in sorted(found)]


def nbytes(modules: Iterable[nn.Module]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in _weights(modules))


def _weights(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    return (weight for module in modules for weight in module.parameters())


class Shelf:
    """Weights taken off their device: they lie in CPU memory, whole, where saving and adapters find them."""

    def __init__(self, root: nn.Module):
        self._root = root
        self._away: list[Tensor] = []

    @property
    def bytes(self) -> int:
        """What is off the device now; what the user moved back is not."""
        return sum(w.numel() * w.element_size() for w in self._away if w.device.type == "cpu")

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Move weights to the CPU (pinned beside CUDA); on a CPU nothing moves."""
        for weight in _weights(modules):
            if weight.device.type in ("cpu", "meta"):
                continue
            pinned = weight.device.type == "cuda"
            host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
            host.copy_(weight.detach())
            weight.data = host
            self._away.append(weight)

    def put_back(self) -> None:
        """Move them to where the rest of the denoiser is, with equal bits."""
        if not self._away:
            return
        away = {id(weight) for weight in self._away}
        home = next((w.device for w in self._root.parameters() if id(w) not in away), torch.device("cpu"))
        for weight in self._away:
            weight.data = weight.data.to(home)
        self._away.clear()
