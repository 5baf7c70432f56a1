"""Skip: contribute nothing, so the residual stream passes unchanged.

Source: layer dropping, here at chosen steps: a sublayer's output is zero, and so is a span's residual.
Keeps: nothing.
Exact when: never used.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Skip:
    """The span or sublayer adds zero to its streams."""

    seams: ClassVar[frozenset[str]] = frozenset({"timeline"})
    computes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    nodes: ClassVar[int] = 0
