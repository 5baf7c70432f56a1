"""The 0/1 program against every combination, and where those are many against an integer solver."""

from itertools import product

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from dit_accel.search.ditfastattn_v2.knapsack import NONE, solve

PUBLISHED = (1.0, (1 - 1 / 16) ** 2, (1 - 1 / 32) ** 2, (1 - 1 / 64) ** 2)


def total(chosen, errors, gains):
    """(gain, error) of a choice."""
    taken = [(head, number) for head, number in enumerate(chosen) if number != NONE]
    return sum(gains[m] for _, m in taken), sum(errors[h, m] for h, m in taken)


def by_hand(errors, gains, delta, cap):
    """The best (gain, error) of all combinations: most gain, then least error."""
    heads, count = errors.shape
    best = (0.0, 0.0)
    for chosen in product(range(-1, count), repeat=heads):
        if any(m != NONE and not errors[h, m] < cap for h, m in enumerate(chosen)):
            continue
        gain, error = total(chosen, errors, gains)
        if error <= delta and (gain > best[0] + 1e-9 or (gain > best[0] - 1e-9 and error < best[1])):
            best = gain, error
    return best


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_best_of_all_combinations(seed):
    draw = np.random.default_rng(seed)
    heads, count = draw.integers(1, 6), draw.integers(1, 5)
    errors = draw.lognormal(-3, 1.5, (heads, count))
    errors[draw.random(errors.shape) < 0.15] = np.inf
    errors[draw.random(errors.shape) < 0.1] = 0.0
    gains = list(draw.choice(PUBLISHED, count)) if seed % 2 else list(draw.random(count))
    delta = float(draw.choice([1e-3, 0.02, 0.1, 0.5]))
    cap = np.inf if seed % 3 else 1.5 * delta / heads
    chosen = solve(errors, gains, delta, cap)
    assert total(chosen, errors, gains) == pytest.approx(by_hand(errors, gains, delta, cap), abs=1e-9)


@pytest.mark.parametrize("delta", [0.05, 0.2, 1.0])
def test_of_many_heads_it_gains_what_an_integer_program_gains(delta):
    draw = np.random.default_rng(3)
    heads, count = 40, len(PUBLISHED)
    errors = draw.lognormal(-4, 1, (heads, count)) * (1 + 3 * np.arange(count)[::-1])
    gains = np.tile(PUBLISHED, heads)
    once = np.kron(np.eye(heads), np.ones(count))
    found = milp(
        -gains,
        constraints=[
            LinearConstraint(once, ub=1),
            LinearConstraint(errors.reshape(1, -1) / delta, ub=1),
        ],
        integrality=np.ones(len(gains)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    gain, error = total(solve(errors, PUBLISHED, delta), errors, PUBLISHED)
    assert error <= delta
    assert gain == pytest.approx(-found.fun, abs=1e-6)


def test_a_head_at_its_cap_is_left_full():
    errors = np.array([[0.1], [0.2], [0.3]])
    assert solve(errors, [1.0], delta=1.0, cap=0.2) == [0, NONE, NONE]
    assert solve(errors, [1.0], delta=1.0) == [0, 0, 0]


def test_of_equal_gain_the_least_error_is_taken():
    assert solve(np.array([[0.2, 0.1]]), [0.5, 0.5], delta=1.0) == [1]
    assert solve(np.array([[0.2], [0.1]]), [1.0], delta=0.25) == [NONE, 0]


def test_what_saves_nothing_is_not_taken():
    assert solve(np.array([[0.0, np.inf]]), [0.0, 1.0], delta=1.0) == [NONE]


def test_more_error_never_saves_less():
    draw = np.random.default_rng(0)
    errors = draw.lognormal(-3, 1, (12, 4))
    gains = [total(solve(errors, PUBLISHED, delta), errors, PUBLISHED)[0] for delta in np.logspace(-3, 1, 20)]
    assert gains == sorted(gains) and gains[-1] == 12
