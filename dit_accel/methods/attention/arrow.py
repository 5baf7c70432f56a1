"""Arrow attention: a window among visual tokens; text sees everything and is seen by everything.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.2.
Keeps: nothing.
Exact when: the radius covers the grid.
"""

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.methods.attention.window import Window


@dataclass(frozen=True)
class Arrow(Window):
    """Attend within `radius` = (frames, rows, columns), and to all text tokens."""

    text_in_window: ClassVar[bool] = True
