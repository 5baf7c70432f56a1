"""Reuse: answer with the output of the last step that computed.

Source: attention sharing across timesteps (AST) of DiTFastAttn, Yuan et al. 2024, arXiv:2406.08552,
    section 3.3; block reuse as in Delta-DiT, arXiv:2406.01125, with the current step's gates as in
    HarmoniCa, arXiv:2410.01723, section 3.1 (the stored output is the one before the gate).
Keeps: per site and branch one tensor [B, N, h, D] (heads), one module output (sublayer), and for a span
    one residual per stream (`gates = "stored"`) or every sublayer's output (`gates = "current"`).
Exact when: never used; at max_age = 0 it computes every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dit_accel.visit import AttentionVisit


@dataclass(frozen=True)
class Reuse:
    """Answer with a stored output at most `max_age` steps old.

    In [attention] an over-age output is computed anew; in [timeline] it is an error, the letters decide.
    `gates` matters for block spans only: "current" re-applies this step's modulation to stored sublayer
    outputs, "stored" adds the span's old residual, which needs far less memory.
    """

    max_age: int = 2
    gates: Literal["current", "stored"] = "current"

    seams: ClassVar[frozenset[str]] = frozenset({"attention", "timeline"})
    computes: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    nodes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.max_age < 0:
            raise ValueError(f"max_age must be a number of steps >= 0; got {self.max_age}")
        if self.gates not in ("current", "stored"):
            raise ValueError(f'gates must be "current" or "stored"; got {self.gates!r}')

    def weights(self, level: float, nodes: Sequence[float]) -> tuple[float, ...]:
        """The newest stored output as it is."""
        return (1.0, *(0.0,) * (len(nodes) - 1))

    def attend(self, visit: AttentionVisit) -> Tensor:  # [B, N, h, D]
        return visit.recall("out", self.max_age)
