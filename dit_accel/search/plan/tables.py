"""From what was measured to what the solver reads: errors weighed by step, medians of seconds."""

from collections.abc import Sequence

import numpy as np

from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.segments import FULL, REUSE, Kind, LayerTable
from dit_accel.search.plan.timing import ModuleSeconds

EMITTING = 1.02  # a full pass that leaves something behind takes at least so many times a plain one
WORTH = 0.97  # of the model's own attention: what full attention through a backend must be under to be used


def full_is_faster(layers: Sequence[ModuleSeconds]) -> bool:
    """Whether full attention through a backend beats the model's own call, in layers of one kind."""
    return sum(each.full for each in layers) < WORTH * sum(each.dense for each in layers)


def layer_table(
    noted: Sequence[Noted], weights: np.ndarray, seconds: ModuleSeconds, backend: bool
) -> LayerTable:
    """One layer's table: errors are means over prompts.

    `weights` [P, T]: what a squared error of the velocity at a step makes of the frames', prompt by prompt;
    `backend`: full attention runs through the fastest one. What a candidate takes is known beside a full pass
    of the same run; here it is brought to the full pass in its place.
    """
    refused = {kind for each in noted for kind in each.refused}
    kinds = [kind for kind in noted[0].pair if kind not in refused]
    heads = noted[0].share.shape[-1]

    def mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
        by = [row.reshape(-1, *[1] * (arrays[0].ndim - 1)) for row in weights]
        return np.mean([array * row for array, row in zip(arrays, by, strict=True)], axis=0)

    full = (seconds.full if backend else seconds.dense) / heads
    beside = seconds.full / _typical(noted, FULL) / heads
    takes: dict[Kind, float] = {FULL: full, REUSE: 0.0}
    anchors: dict[Kind, float] = {REUSE: full}
    for kind in kinds:
        if isinstance(kind, Candidate):
            # a tail and a residual of one near set read and write as much: one price for both
            takes[kind] = beside * _typical(noted, kind.as_tail)
            emitting = beside * _typical(noted, f"anchor {kind.as_tail}") if kind.anchored else 0.0
            anchors[kind] = max(emitting, full * EMITTING) if kind.anchored else full
    return LayerTable(
        {kind: mean([each.pair[kind] for each in noted]) for kind in kinds},
        {kind: mean([each.lone[kind] for each in noted]) for kind in kinds},
        mean([each.share for each in noted]),
        mean([each.module for each in noted]),
        mean([each.shared for each in noted]),
        takes,
        anchors,
        seconds.around,
    )


def _typical(noted: Sequence[Noted], name: str) -> float:
    return float(np.median([seconds for each in noted for seconds in each.seconds[name]]))
