"""The layer solver against brute force over every legal plan, and what it must never do."""

import itertools

import numpy as np
import pytest

from dit_accel.search.plan.candidates import Candidate
from dit_accel.search.plan.segments import CC, CS, FULL, REUSE, RS, LayerPlan, LayerSolver, LayerTable

NEAR = Candidate("brick", {"extent": (0, 0, 0)}, 0.1)
TAIL = Candidate("tail", {"extent": (0, 0, 0)}, 0.1)
FEEDS = [(fed, follows) for fed in (None, REUSE, TAIL) for follows in (False, True)]


def table(seed, steps=4, ages=2, heads=2, scale=1.0):
    """Random errors and seconds; what lies before the first step is infinite, as when measured."""
    rng = np.random.default_rng(seed)

    def aged(*more):
        values = rng.random((steps, ages, *more)) * scale
        for step in range(steps):
            values[step, step:] = np.inf
        return values

    kinds = {NEAR: rng.random((steps, heads)), TAIL: aged(heads), REUSE: aged(heads)}
    lone = {kind: values * rng.random() for kind, values in kinds.items()}
    seconds = {FULL: 1.0, NEAR: 0.3, TAIL: 0.4, REUSE: 0.0}
    anchors = {TAIL: 1.1, REUSE: 1.0, NEAR: 1.0}
    return LayerTable(kinds, lone, aged(heads), aged(), aged(), seconds, anchors, around=0.5)


def segmentations(steps, ages):
    """Every way to cut the steps into segments of at most ages + 1."""
    for cuts in itertools.product((False, True), repeat=steps - 1):
        starts = [0, *(step for step, cut in enumerate(cuts, 1) if cut)]
        lengths = np.diff([*starts, steps])
        if max(lengths) <= ages + 1:
            yield list(zip(starts, lengths.tolist(), strict=True))


def module_error(t, start, actions):
    """The errors of whole modules, by the words of the docstring."""
    error, both, computed = 0.0, start, start
    for step, action in enumerate(actions, start + 1):
        if action == CC:
            both = computed = step
        elif action == CS:
            error, computed = error + t.shared[step, step - both - 1], step
        else:
            error += t.module[step, step - computed - 1]
            if computed > both:
                error += t.shared[computed, computed - both - 1]
    return error


def head_cost(t, start, actions, head, price):
    """The least cost of one head in a segment, over what its anchor feeds and what it does at each step."""
    best = np.inf
    for fed, follows in FEEDS:
        if fed is None:
            cost = min(price * 2 * t.seconds[FULL], t.pair[NEAR][start, head] + price * 2 * t.seconds[NEAR])
        else:
            cost = 2 * price * t.anchors[fed]
        for step, action in enumerate(actions, start + 1):
            if action == RS:
                continue
            alone = follows or action == CS
            errors, times = (t.lone, 1) if alone else (t.pair, 2)
            age = step - start - 1
            branches = price * times
            options = [branches * t.seconds[FULL], errors[NEAR][step, head] + branches * t.seconds[NEAR]]
            if fed == REUSE:
                options = [errors[REUSE][step, age, head]]
            elif fed == TAIL:
                options.append(errors[TAIL][step, age, head] + price * times * t.seconds[TAIL])
            cost += min(options)
            if follows and action == CC:
                cost += t.share[step, age, head]
        best = min(best, cost)
    return best


def brute_force(t, price):
    """The least cost of all plans."""
    steps, ages, heads = t.shape
    best = np.inf
    for cut in segmentations(steps, ages):
        total = 0.0
        for start, length in cut:
            totals = []
            for actions in itertools.product((CC, CS, RS), repeat=length - 1):
                branches = 2 + sum({CC: 2, CS: 1, RS: 0}[action] for action in actions)
                cost = module_error(t, start, actions) + price * t.around * branches
                totals.append(cost + sum(head_cost(t, start, actions, head, price) for head in range(heads)))
            total += min(totals)
        best = min(best, total)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [0.01, 0.2, 0.7, 3.0])
def test_the_plan_is_the_best_of_all(seed, price):
    t = table(seed)
    plan = LayerSolver(t).solve(price)
    assert plan.error + price * plan.seconds == pytest.approx(brute_force(t, price), rel=1e-9)


def test_what_costs_nothing_to_keep_stays_exact():
    plan = LayerSolver(table(0)).solve(0.0)
    assert plan.error == 0


def test_a_higher_price_is_never_slower():
    solver = LayerSolver(table(3, steps=9, ages=3, heads=3))
    plans = [solver.solve(price) for price in np.geomspace(1e-3, 1e3, 25)]
    for cheap, dear in itertools.pairwise(plans):
        assert dear.seconds <= cheap.seconds + 1e-9
        assert dear.error >= cheap.error - 1e-9


def test_what_cannot_be_is_never_chosen():
    t = table(1, steps=6)
    for values in (t.share, t.shared, t.module, t.pair[TAIL], t.lone[TAIL]):
        values[:] = np.inf
    plan = LayerSolver(t).solve(1e9)
    assert set(plan.actions) == {CC}
    assert not any(follows for row in plan.follows for follows in row)
    assert TAIL not in {pick for row in plan.picks for pick in row}
    assert np.isfinite(plan.error)


def test_an_anchor_feeds_only_what_is_read():
    t = table(2, steps=8, ages=3, heads=3)
    for price in (0.05, 0.3, 1.0):
        plan = LayerSolver(t).solve(price)
        for step, row in enumerate(plan.feeds):
            for head, fed in enumerate(row):
                later = [plan.picks[k][head] for k in range(step + 1, min(step + 4, 8))]
                assert fed is None or fed in later


def test_errors_and_seconds_of_a_plan_add_up():
    plan = LayerSolver(table(5, steps=7)).solve(0.3)
    assert plan.error == pytest.approx(sum(plan.by_step))
    whole = LayerPlan.full(7, 2)
    assert whole.error == 0 and set(whole.actions) == {CC}
