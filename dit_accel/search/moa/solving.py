"""Which rule each head takes: the least error at several sizes, with a bound on the work at each of them.

Source: MoA, Fu et al. 2024, arXiv:2406.14909, section 3.3: one rule a head, a bound at every length, several
objectives, a Pareto set of which a length that was not calibrated decides. Here the points of that set are
those of weighted sums, solved by HiGHS, in place of an epsilon-constraint sweep.
"""

from collections.abc import Sequence

import numpy as np

from dit_accel.errors import BadUsage

FAVOURED = 0.8  # the weight of one size where it is favoured; the others share the rest
GAP = 1e-4  # how near to the optimum a solution is


def weightings(sizes: int) -> list[np.ndarray]:
    """Weights of the sizes' errors, even ones first."""
    even = np.full(sizes, 1 / sizes)
    if sizes == 1:
        return [even]
    rest = (1 - FAVOURED) / (sizes - 1)
    return [even, *(np.where(np.arange(sizes) == size, FAVOURED, rest) for size in range(sizes))]


def assign(
    errors: np.ndarray, work: np.ndarray, shares: np.ndarray, bound: float, weights: np.ndarray
) -> np.ndarray:
    """The choice [U] of every unit: 0 is full attention, r the rule r - 1.

    `errors` [S, U, R + 1] of each choice at each size, infinite where it cannot be, `work` [S, R + 1] the
    share of all pairs that it attends, `shares` [U] the part of all attention that a unit is. At no size
    more than `bound` of the work is kept. Raises BadUsage where no rules keep so little.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    sizes, units, choices = errors.shape
    possible = np.isfinite(errors).all(axis=0)
    finite = np.where(possible, errors, 0.0)
    size_of = np.maximum(finite.max(axis=2).sum(axis=1), 1e-300)  # errors of sizes are of no common scale
    cost = np.tensordot(weights / size_of, finite, axes=1).ravel()
    most = possible.ravel().astype(float)
    one_each = kron(csr_array(np.eye(units)), np.ones((1, choices)), format="csr")
    kept = np.stack([np.outer(shares, work[size]).ravel() for size in range(sizes)])
    result = milp(
        cost / max(cost.max(), 1e-300),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(kept, ub=bound)],
        integrality=np.ones(cost.size),
        bounds=Bounds(np.zeros_like(most), most),  # pyright: ignore[reportArgumentType] - arrays are meant
        options={"mip_rel_gap": GAP},
    )
    if result.x is None:
        least = max(
            float((shares * np.where(possible, work[size], 1.0).min(axis=1)).sum()) for size in range(sizes)
        )
        raise BadUsage(
            f"asked to keep {bound:.1%} of the attention's work; the rules of these sizes keep {least:.1%} "
            "at least. Ask for more, or calibrate at greater sizes."
        )
    return result.x.reshape(units, choices).argmax(1)


def fronts(errors: np.ndarray, work: np.ndarray, shares: np.ndarray, bound: float) -> list[np.ndarray]:
    """Solutions of which none is better at every size, even weights first."""
    found: list[np.ndarray] = []
    for weights in weightings(len(errors)):
        chosen = assign(errors, work, shares, bound, weights)
        if not any(np.array_equal(chosen, other) for other in found):
            found.append(chosen)
    return found


def foretold(errors: np.ndarray, chosen: Sequence[int] | np.ndarray) -> np.ndarray:
    """[S]: what a solution's errors add up to at each size."""
    return errors[:, np.arange(errors.shape[1]), np.asarray(chosen)].sum(1)
