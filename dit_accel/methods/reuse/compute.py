"""Compute: run the span or sublayer as the model wrote it.

Source: the model itself.
Keeps: nothing by itself; the plan stores its output where a later step needs it.
Exact when: always.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Compute:
    """The model's own computation."""

    seams: ClassVar[frozenset[str]] = frozenset({"timeline"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
