"""Tensors of many axes as rows: what the backends walk over, with no copy.

Axes that lie in memory as one are merged, the last one too: where nothing broadcasts and all is contiguous,
one long row is left. What cannot be merged into AXES axes of rows is declined.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

AXES = 3  # of rows, which the kernels are written for
Place = tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of a tensor


class Rows(NamedTuple):
    """`size` counts rows on AXES axes; `width` numbers in each; `strides[i]`, in elements, is operand i's."""

    size: tuple[int, ...]
    width: int
    strides: list[tuple[int, ...]]


def rows_of(tensors: Iterable[Tensor], scales: Iterable[Tensor | None]) -> Rows | str:
    """Rows of tensors that broadcast to the first of them, then of scales [..., 1]; or why there are none."""
    return _rows_of(
        tuple([(t.shape, t.stride()) for t in tensors]),
        tuple([(t.shape, t.stride()) for t in scales if t is not None]),
    )


@functools.lru_cache(maxsize=256)  # a run calls with few layouts, many times each
def _rows_of(tensors: tuple[Place, ...], scales: tuple[Place, ...]) -> Rows | str:
    shape = tensors[0][0]
    if any(strides[-1] != 1 and own[-1] > 1 for own, strides in tensors):
        return "the last axis of a tensor is not contiguous"
    whole = [_expanded(place, len(shape)) for place in (*tensors, *scales)]
    # within a row all move by one number, but scales stay
    sizes, steps = [shape[-1]], [[1] * len(tensors) + [0] * len(scales)]
    for axis in range(len(shape) - 2, -1, -1):
        step = [strides[axis] for strides in whole]
        if shape[axis] == 1:
            continue
        if step == [inner * sizes[-1] for inner in steps[-1]]:
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
            steps.append(step)
    missing = AXES + 1 - len(sizes)
    if missing < 0:
        return f"its axes do not merge into {AXES} of rows and one of columns: shape {list(shape)}"
    size = (1,) * missing + tuple(sizes[:0:-1])
    strides = [(0,) * missing + tuple(axis[i] for axis in steps[:0:-1]) for i in range(len(whole))]
    return Rows(size, sizes[0], strides)


def _expanded(place: Place, axes: int) -> list[int]:
    """Strides as if the tensor had that many axes: 0 along what broadcasts."""
    own = [step if n > 1 else 0 for n, step in zip(*place, strict=True)]
    return [0] * (axes - len(own)) + own
