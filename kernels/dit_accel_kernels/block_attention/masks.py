"""Which keys a query sees: nothing (all of them), a bool tensor, or a window that is written out row by row.

A window keeps pairs of visual tokens within a box: |frame distance| <= radius[0], |row distance| <= radius[1],
|column distance| <= radius[2]. Text that shares the sequence sees all and is seen by all, which makes the window
an arrow (DiTFastAttnV2, arXiv:2503.22796, there along one axis). It is exact when the radius covers the grid.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """The window as a rule: of a long video some rows of the mask fit in memory, all of them do not."""

    grid: tuple[int, int, int]  # visual tokens: frames, rows, columns
    radius: tuple[int, int, int]  # frames, rows, columns on each side
    num_text: int = 0
    text_first: bool = True  # [text, visual], else [visual, text]

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or min(self.radius) < 0 or self.num_text < 0:
            raise ValueError(
                f"window: grid must be positive, radius and num_text not negative; got grid {self.grid}, "
                f"radius {self.radius}, num_text {self.num_text}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """[N, N], text included."""
        return (prod(self.grid) + self.num_text,) * 2

    def covers_grid(self) -> bool:
        """Whether every token sees every other one: then the window is full attention."""
        return all(reach >= size - 1 for reach, size in zip(self.radius, self.grid, strict=True))

    def rows(self, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Rows start to stop of the mask: bool [stop - start, N]."""
        key = torch.arange(self.shape[1], device=device)
        query = key[start:stop]
        near = self._is_text(query)[:, None] | self._is_text(key)[None, :]
        inside = torch.ones_like(near)
        for of_query, of_key, reach in zip(
            self._coordinates(query), self._coordinates(key), self.radius, strict=True
        ):
            inside &= (of_query[:, None] - of_key[None, :]).abs() <= reach
        return near | inside

    def _is_text(self, token: Tensor) -> Tensor:
        return token < self.num_text if self.text_first else token >= prod(self.grid)

    def _coordinates(self, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of visual tokens, in raster order; of text they mean nothing."""
        _, rows, columns = self.grid
        visual = token - self.num_text if self.text_first else token
        return visual // (rows * columns), visual // columns % rows, visual % columns


Mask = Tensor | Window | None


def window_mask(
    grid: tuple[int, int, int],
    radius: tuple[int, int, int],
    num_text: int = 0,
    text_first: bool = True,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The window written out: bool [N, N]."""
    window = Window(tuple(grid), tuple(radius), num_text, text_first)
    return window.rows(0, window.shape[0], device)
