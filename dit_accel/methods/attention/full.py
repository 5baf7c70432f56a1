"""Full attention: the pipeline's own dense call, untouched.

Source: the model itself.
Keeps: nothing.
Exact when: always; this is the baseline every other method is measured against.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_accel.visit import AttentionVisit


@dataclass(frozen=True)
class Full:
    """The pipeline's own attention backend, called with its own arguments."""

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    computes: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.dense()
