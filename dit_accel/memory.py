"""What a run remembers: owned buffers keyed by (component, site, branch, layout), never an activation.

Every value is copied into a buffer of our own, so that nothing a kernel later overwrites in place can
change it, and a buffer is reused from step to step. Values of several steps stand in a ring of buffers.

How they are stored is a choice: as they came ("model"), in 8 bits with a scale for each row ("fp8", half of
bfloat16 and 3 bits of mantissa), or in the CPU's memory, pinned where there is a GPU ("cpu").
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.history_mix import quantize_rows_fp8

Address = tuple[str, str, str, tuple[Any, ...]]  # component, site, branch, layout


@dataclass
class Slot:
    """One stored value: its tensors, and for each head (0 where there are none) the step that made it."""

    tensors: tuple[Tensor, ...]
    made_at: dict[int, int] = field(default_factory=dict)
    scales: tuple[Tensor | None, ...] = ()  # float32 [..., 1] of a tensor in 8 bits

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.tensors, *self.scales) if t is not None)

    @property
    def step(self) -> int:
        """The step that made a whole value."""
        return self.made_at[0]

    def on(self, device: torch.device) -> "Slot":
        """The value on a device; itself where it is there."""
        if all(tensor.device == device for tensor in self.tensors):
            return self
        moved = tuple(tensor.to(device, non_blocking=True) for tensor in self.tensors)
        return Slot(moved, self.made_at, self.scales)


@dataclass
class Memory:
    """The stored values of one run."""

    slots: dict[tuple[Address, str], Slot] = field(default_factory=dict)
    storage: str = "model"  # of whole values: "model", "fp8" or "cpu"
    peak_bytes: int = 0
    _bytes: int = 0

    def store(
        self, address: Address, name: str, tensors: Sequence[Tensor], step: int, depth: int = 1,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """Copy whole tensors; the values of the last `depth` stored steps stay.

        What must come back to the last bit is `exact`: it is stored as it came, whatever the storage.
        """
        storage = "model" if exact else self.storage
        coded = [_code(tensor.detach(), storage) for tensor in tensors]
        place = self._place(address, name, step, depth)
        like, scales = [value for value, _ in coded], [scale for _, scale in coded]
        slot = self._slot(address, place, like, scales, storage)
        for buffer, value in zip((*slot.tensors, *slot.scales), (*like, *scales), strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value, non_blocking=buffer.device != value.device)
        slot.made_at = {0: step}

    def history(self, address: Address, name: str) -> list[Slot]:
        """The stored values of a ring, newest first."""
        found: list[Slot] = []
        while (slot := self.slots.get((address, _ring(name, len(found))))) is not None:
            found.append(slot)
        return sorted(found, key=lambda slot: slot.step, reverse=True)

    def _place(self, address: Address, name: str, step: int, depth: int) -> str:
        """The name of the ring's place that this step's value goes to: its own, a free one, or the oldest."""
        made = {}
        for place in (_ring(name, index) for index in range(depth)):
            slot = self.slots.get((address, place))
            if slot is None or slot.step == step:
                return place
            made[place] = slot.step
        return min(made, key=made.__getitem__)

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

    def _slot(
        self,
        address: Address,
        name: str,
        like: Sequence[Tensor],
        scales: Sequence[Tensor | None] = (),
        storage: str = "model",
    ) -> Slot:
        old = self.slots.get((address, name))
        if old is not None and _same(old.tensors, like, storage):
            return old
        new = Slot(
            tuple(_buffer(tensor, storage) for tensor in like),
            scales=tuple(None if scale is None else torch.empty_like(scale) for scale in scales),
        )
        self._bytes += new.bytes - (old.bytes if old else 0)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        self.slots[address, name] = new
        return new


def _ring(name: str, place: int) -> str:
    return name if place == 0 else f"{name}.{place}"


def _code(tensor: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """A tensor as it is stored, with the scales of its rows."""
    if storage != "fp8" or not tensor.is_floating_point() or tensor.ndim == 0:
        return tensor, None
    return quantize_rows_fp8(tensor)


def _buffer(like: Tensor, storage: str) -> Tensor:
    on_cpu = storage == "cpu"
    pinned = on_cpu and like.device.type == "cuda"
    return torch.empty(
        like.shape, dtype=like.dtype, device="cpu" if on_cpu else like.device, pin_memory=pinned
    )


def _same(buffers: Sequence[Tensor], like: Sequence[Tensor], storage: str) -> bool:
    return len(buffers) == len(like) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype) and (storage == "cpu" or a.device == b.device)
        for a, b in zip(buffers, like, strict=True)
    )
