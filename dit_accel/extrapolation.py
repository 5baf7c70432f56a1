"""Weights of stored outputs that continue them to another noise level.

Every forecaster here is a weighted sum of stored outputs, so that one op (`history_mix`) serves them all.
With nodes u_1 (newest), u_2, ... and the level u of the step that is answered:

    lagrange   w_j = prod_{m != j} (u - u_m) / (u_j - u_m), the interpolating polynomial: exact on
               polynomials of degree k = nodes - 1 in u, where it is a Taylor expansion of order k.
    taylor     y(u_1) + sum_o (u - u_1)^o y[u_1, ..., u_{o+1}] with divided differences as derivatives:
               TaylorSeer's rule (Liu et al. 2025, arXiv:2503.06923, section 3.2) in noise level instead of
               step index. Exact on polynomials of degree 1; above it it reaches less far than lagrange.

Levels of the nodes must differ; nodes of a level that is already there are left out (weight 0).
"""

from collections.abc import Sequence

KINDS = ("lagrange", "taylor")


def weights(kind: str, level: float, nodes: Sequence[float]) -> tuple[float, ...]:
    """One weight for each node, newest first; they sum to 1 (up to rounding)."""
    places = [i for i, node in enumerate(nodes) if node not in nodes[:i]]
    distinct = [nodes[i] for i in places]
    found = _lagrange(level, distinct) if kind == "lagrange" else _taylor(level, distinct)
    spread = [0.0] * len(nodes)
    for place, weight in zip(places, found, strict=True):
        spread[place] = weight
    return tuple(spread)


def _lagrange(level: float, nodes: Sequence[float]) -> list[float]:
    found = []
    for j, own in enumerate(nodes):
        weight = 1.0
        for m, other in enumerate(nodes):
            if m != j:
                weight *= (level - other) / (own - other)
        found.append(weight)
    return found


def _taylor(level: float, nodes: Sequence[float]) -> list[float]:
    found = [0.0] * len(nodes)
    for order in range(len(nodes)):
        for j, share in enumerate(_divided_difference(nodes[: order + 1])):
            found[j] += (level - nodes[0]) ** order * share
    return found


def _divided_difference(nodes: Sequence[float]) -> list[float]:
    """y[u_1, ..., u_n] as weights of the y_j."""
    found = []
    for j, own in enumerate(nodes):
        weight = 1.0
        for m, other in enumerate(nodes):
            if m != j:
                weight /= own - other
        found.append(weight)
    return found
