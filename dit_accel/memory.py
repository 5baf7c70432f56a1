"""What a run remembers: owned buffers keyed by (component, site, branch, layout), never an activation.

Every value is copied into a buffer of our own, so that nothing a kernel later overwrites in place can
change it, and a buffer is reused from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Address = tuple[str, str, str, tuple[Any, ...]]  # component, site, branch, layout


@dataclass
class Slot:
    """One stored value: its tensors, and for each head (0 where there are none) the step that made it."""

    tensors: tuple[Tensor, ...]
    made_at: dict[int, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


@dataclass
class Memory:
    """The stored values of one run."""

    slots: dict[tuple[Address, str], Slot] = field(default_factory=dict)
    peak_bytes: int = 0
    _bytes: int = 0

    def store(self, address: Address, name: str, tensors: Sequence[Tensor], step: int) -> None:
        """Copy whole tensors."""
        slot = self._slot(address, name, tensors)
        for buffer, tensor in zip(slot.tensors, tensors, strict=True):
            buffer.copy_(tensor.detach())
        slot.made_at = {0: step}

    def store_heads(
        self, address: Address, name: str, value: Tensor, heads: Sequence[int], of: Sequence[int], step: int,
        places: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Copy `heads` of value [B, N, H, D] into a buffer that holds the heads `of`.

        `places` are the heads' positions in `value` where it does not hold all of them.
        """
        B, N, _, D = value.shape
        slot = self._slot(address, name, [value.new_empty((), dtype=value.dtype).expand(B, N, len(of), D)])
        for place, head in zip(heads if places is None else places, heads, strict=True):
            slot.tensors[0][:, :, of.index(head)].copy_(value[:, :, place].detach())
            slot.made_at[head] = step

    def recall(self, address: Address, name: str) -> Slot | None:
        """The stored value, or None."""
        return self.slots.get((address, name))

    def clear(self) -> None:
        """Drop everything; the peak is forgotten too."""
        self.slots.clear()
        self._bytes = self.peak_bytes = 0

    def release(self) -> None:
        """Drop everything, remember the peak."""
        self.slots.clear()
        self._bytes = 0

    def _slot(self, address: Address, name: str, like: Sequence[Tensor]) -> Slot:
        old = self.slots.get((address, name))
        if old is not None and _same(old.tensors, like):
            return old
        new = Slot(tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like))
        self._bytes += new.bytes - (old.bytes if old else 0)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.slots[address, name] = new
        return new


def _same(buffers: Sequence[Tensor], like: Sequence[Tensor]) -> bool:
    return len(buffers) == len(like) and all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        for a, b in zip(buffers, like, strict=True)
    )
