"""How errors of heads are weighed: as the output projection, and what comes after it, feels them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.visit import AttentionVisit

SAMPLED = 512  # visual tokens of a layer whose rows are looked at


@dataclass(frozen=True)
class Stream:
    """How an error of some rows of an attention's heads is felt: S^T S over all heads, [H d, H d]."""

    gram: Tensor

    def of_heads(self, wrong: Tensor) -> np.ndarray:
        """[H]: weighted squared errors of single heads, the mean over samples; `wrong` [B, N, H, d]."""
        count, width = wrong.shape[2:]
        blocks = self.gram.unflatten(0, (count, width)).unflatten(2, (count, width))
        own = torch.stack([blocks[head, :, head] for head in range(count)])
        moments = torch.einsum("bnhd,bnhe->hde", wrong.float(), wrong.float()).double().cpu()
        return (moments * own).sum((1, 2)).clamp(min=0).numpy() / wrong.shape[0]

    def of_all(self, wrong: Tensor) -> float:
        """The weighted squared error of all heads together, the mean over samples."""
        flat = wrong.flatten(2).flatten(0, 1).float()
        moments = (flat.T @ flat).double().cpu()
        return float((moments * self.gram).sum().clamp(min=0)) / wrong.shape[0]


@dataclass(frozen=True)
class Rows:
    """The tokens of a layer that are looked at: some visual ones, and all text."""

    visual: Tensor  # int64 places among the visual tokens
    scale: float  # all visual tokens / those looked at

    @classmethod
    def drawn(cls, tokens: int, seed: int = 0) -> "Rows":
        """`SAMPLED` of the visual tokens."""
        count = min(SAMPLED, tokens)
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        return cls(order[:count].sort().values, tokens / count)

    def split(self, visit: AttentionVisit, values: Tensor) -> "Split":
        """The rows looked at of [B, N, H, d]."""
        visual, text = _visual(visit)
        return Split(values[:, visual].index_select(1, self.visual), values[:, text])


@dataclass(frozen=True)
class Split:
    """Visual and text rows [B, n, H, d] of an output, or of what is wrong with it."""

    visual: Tensor
    text: Tensor

    def __sub__(self, other: "Split") -> "Split":
        return Split(self.visual - other.visual, self.text - other.text)

    def __add__(self, other: "Split") -> "Split":
        return Split(self.visual + other.visual, self.text + other.text)

    def times(self, factor: float) -> "Split":
        """Multiplied by a number."""
        return Split(factor * self.visual, factor * self.text)

    @property
    def has_text(self) -> bool:
        return self.text.shape[1] > 0


def _visual(visit: AttentionVisit) -> tuple[slice, slice]:
    """The visual and the text rows of a sequence."""
    total, text = visit.q.shape[1], visit.num_text
    if visit.text_first:
        return slice(text, total), slice(0, text)
    return slice(0, total - text), slice(total - text, total)


@dataclass(frozen=True)
class Felt:
    """The weights of a layer's errors at one step, for its visual and its text rows.

    Both branches are weighed alike, by their mean: they run the same layers at one noise level.
    """

    visual: Stream
    text: Stream | None
    guidance: float

    def pair(self, rows: Rows, cond: Split, uncond: Split, of: str) -> Any:
        """The error of v = u + g (c - u) where both branches are wrong; `of` is "of_heads" or "of_all"."""
        g = self.guidance
        found = getattr(self.visual, of)(g * cond.visual + (1 - g) * uncond.visual) * rows.scale
        if cond.has_text:  # texts differ in length: no cancelling is counted on
            text = getattr(self.text or self.visual, of)
            found = found + g**2 * text(cond.text) + (1 - g) ** 2 * text(uncond.text)
        return found

    def lone(self, rows: Rows, cond: Split, of: str) -> Any:
        """The error where uncond is cond's and a difference: visual rows are wrong on both alike."""
        found = getattr(self.visual, of)(cond.visual) * rows.scale
        if cond.has_text:  # uncond's text is its own
            found = found + self.guidance**2 * getattr(self.text or self.visual, of)(cond.text)
        return found
