"""Arrow attention: a window among visual tokens, while text sees all and is seen by all.

Source: DiTFastAttnV2, Zhang et al. 2025, arXiv:2503.22796, section 3.2. The box of `window` takes the
    place of the paper's 1-D band; without text in the sequence the two are the same.
Keeps: nothing.
Exact when: the radius covers the grid.
"""

from dataclasses import dataclass

from dit_accel.methods.attention.window import Window


@dataclass(frozen=True)
class Arrow(Window):
    """Attend within `radius` = (frames, rows, columns) tokens on each side, and to all text tokens."""
