"""Which keys a query sees: all of them (None), a bool tensor, or a rule that writes its rows when asked.

A window keeps pairs of visual tokens in a box: |frame distance| <= radius[0], |row distance| <= radius[1],
|column distance| <= radius[2]. Text that shares the sequence sees everything. With `text_visible` it is also
seen by everything, which makes the window an arrow (DiTFastAttnV2, arXiv:2503.22796, there along one axis).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowMask:
    """The window as a rule: of a long video some rows of the mask fit in memory, all of them do not."""

    grid: tuple[int, int, int]  # visual tokens: frames, rows, columns
    radius: tuple[int, int, int]  # frames, rows, columns on each side
    num_text: int = 0
    text_first: bool = True  # [text, visual], else [visual, text]
    text_visible: bool = True  # whether visual tokens see the text

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or min(self.radius) < 0 or self.num_text < 0:
            raise ValueError(
                f"window: grid must be positive, radius and num_text not negative; got grid {self.grid}, "
                f"radius {self.radius}, num_text {self.num_text}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """[N, N], text included."""
        tokens = prod(self.grid) + self.num_text
        return tokens, tokens

    def rows(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows start to stop of the mask: bool [stop - start, N]."""
        key = torch.arange(self.shape[1], device=device)
        query = key[start:stop]
        text_query, text_key = self._is_text(query)[:, None], self._is_text(key)[None, :]
        near = ~(text_query | text_key)  # [rows, N]
        for of_query, of_key, reach in zip(
            self._coordinates(query), self._coordinates(key), self.radius, strict=True
        ):
            near &= (of_query[:, None] - of_key[None, :]).abs() <= reach
        return near | text_query | (text_key & self.text_visible)

    def __and__(self, other: Tensor) -> BothMasks:
        """Narrowed by a bool tensor, such as one that hides padded text."""
        return BothMasks(self, other)

    def _is_text(self, token: Tensor) -> Tensor:
        return token < self.num_text if self.text_first else token >= prod(self.grid)

    def _coordinates(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of visual tokens in raster order; of text they mean nothing."""
        _, rows, columns = self.grid
        visual = token - self.num_text if self.text_first else token
        return visual // (rows * columns), visual // columns % rows, visual % columns


@dataclass(frozen=True)
class BothMasks:
    """Keeps what a window and a bool tensor both keep."""

    window: WindowMask
    tensor: Tensor  # broadcasts to [B, H, N, N]

    @property
    def shape(self) -> torch.Size:
        """As if it were written out."""
        return torch.broadcast_shapes(self.window.shape, self.tensor.shape)

    def rows(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows start to stop: bool [..., stop - start, N]."""
        return self.window.rows(start, stop, device) & rows_of(self.tensor, start, stop, device)


Mask = Tensor | WindowMask | BothMasks | None


def rows_of(
    mask: Tensor | WindowMask | BothMasks, start: int, stop: int, device: torch.device | str
) -> Tensor:
    """Rows start to stop of any mask; a tensor may have one row that stands for all of them."""
    if not isinstance(mask, Tensor):
        return mask.rows(start, stop, device)
    return (mask if mask.shape[-2] == 1 else mask[..., start:stop, :]).to(device)


def window_mask(
    grid: tuple[int, int, int],
    radius: tuple[int, int, int],
    num_text: int = 0,
    text_first: bool = True,
    text_visible: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The window written out: bool [N, N]."""
    window = WindowMask(grid, radius, num_text, text_first, text_visible)
    return window.rows(0, window.shape[0], device)
