"""Plans of the whole pipeline: goals by one price, recipes that run as planned, blame, and the state file."""

import math

import numpy as np
import pytest

from dit_accel import api
from dit_accel.errors import BadUsage
from dit_accel.generate import generate
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal
from dit_accel.search.plan.candidates import Candidate, menu, near_sets
from dit_accel.search.plan.planning import PipelinePlan, Planner
from dit_accel.search.plan.repair import Scales, blame, ranges_of, without_steps
from dit_accel.search.plan.search import PlanSearch, Tried
from dit_accel.search.plan.segments import CC, CS, FULL, REUSE, RS, LayerPlan
from dit_accel.search.plan.state import State
from dit_accel.search.plan.storing import bytes_of
from dit_accel.search.plan.timing import Seconds
from dit_accel.search.plan.writing import recipe_of
from dit_accel.search.subject import look
from tests.search.conftest import JOBS
from tests.search.plan.test_scores import LARGER, SITE
from tests.search.plan.test_segments import table


class Silent:
    def generation(self, done, total, what):
        pass

    def step(self, done, total):
        pass


def tables():
    made = [table(n, steps=8, ages=3, heads=2, scale=10.0**-n) for n in range(3)]
    return {("transformer", f"blocks.{n}.attn1"): each for n, each in enumerate(made)}


def test_a_goal_in_seconds_is_met_and_nothing_dearer_is():
    planner = Planner(tables(), rest=5.0)
    free, fastest = planner.at(0.0), planner.at(1e9)
    for share in (0.2, 0.5, 0.8):
        wanted = free.seconds + share * (fastest.seconds - free.seconds)
        plan = planner.within_seconds(wanted)
        assert plan.seconds <= wanted
        assert planner.at(plan.price * 0.8).seconds > wanted or plan.price < 1e-9
    assert planner.within_seconds(0.0).seconds == fastest.seconds


def test_a_goal_in_errors_is_met_and_uses_what_it_may():
    planner = Planner(tables(), rest=5.0)
    most = planner.at(1e9).error
    for share in (1e-3, 0.05, 0.4):
        plan = planner.within_error(share * most)
        assert plan.error <= share * most
        assert planner.at(plan.price * 1.3).error > share * most


def test_a_layer_whose_errors_count_less_is_approximated_more():
    plan = Planner(tables(), rest=0.0).at(0.02)
    seconds = [layer.seconds for layer in plan.layers.values()]
    assert seconds[0] > seconds[1] > seconds[2]


def test_layers_that_make_the_least_of_their_bytes_keep_nothing():
    free = Planner(tables(), rest=5.0).at(0.05)
    kept = {key: bytes_of(plan, 10, 4, 4) for key, plan in free.layers.items()}
    assert all(kept.values())
    limit = sum(kept.values()) - 1
    bounded = Planner(tables(), 5.0, limit, lambda key, plan: bytes_of(plan, 10, 4, 4)).at(0.05)
    found = {key: bytes_of(plan, 10, 4, 4) for key, plan in bounded.layers.items()}
    assert sum(found.values()) <= limit
    assert [key for key in kept if found[key] != kept[key]] == [key for key in kept if not found[key]]
    assert sum(not each for each in found.values()) == 1
    nothing = Planner(tables(), 5.0, 0.0, lambda key, plan: bytes_of(plan, 10, 4, 4)).at(0.05)
    assert not any(bytes_of(plan, 10, 4, 4) for plan in nothing.layers.values())


def test_bytes_are_those_that_a_run_keeps():
    plan = LayerPlan.full(6, 2)
    assert bytes_of(plan, 100, 8, 4) == 0
    tail = Candidate("tail", {"extent": (0, 0, 0)}, 0.1)
    plan.feeds[0][1] = plan.picks[1][1] = tail
    assert bytes_of(plan, 100, 8, 4) == 100 * 2 * (8 * 4 + 4)  # on both branches, with a log-sum-exp
    plan.actions[2] = CS
    assert bytes_of(plan, 100, 8, 4) == 100 * (2 * (8 * 4 + 4) + 2 * 2 * 8 * 4)  # whole modules


def test_extents_of_a_grid_differ_and_save_something():
    for grid in ((9, 16, 16), (1, 32, 32), (5, 7, 9), (1, 20, 12)):
        found = near_sets(grid)
        assert len(found) == len(set(found)) and all(0 < density <= 0.6 for density in found.values())
    assert not near_sets((1, 8, 8)), "one brick holds it all"
    methods = {candidate.method for candidate in menu((9, 16, 16))}
    assert methods == {"brick", "tail", "residual", "coreset"}


def plan_of_everything(near, tail, first=0):
    """Twelve steps, four heads, two segments: heads reuse, follow, see what is near, complete."""
    plan = LayerPlan.full(12, 4)
    actions = {1: CC, 2: CS, 3: RS, 4: CC, 6: RS, 7: CC, 8: CS, 9: RS}
    for step, action in actions.items():
        plan.actions[step] = action
    heads = [(first + n) % 4 for n in range(4)]
    for start, later in ((0, (1, 2, 4)), (5, (7, 8))):
        plan.feeds[start][heads[0]] = plan.feeds[start][heads[3]] = tail
        for step in later:
            for head, kind in zip(heads, (tail, REUSE, near, tail), strict=True):
                plan.picks[step][head] = kind
            plan.follows[step][heads[3]] = plan.actions[step] == CC
    plan.picks[10] = plan.picks[11] = [near] * 4
    plan.by_step = [1.0] * 12
    return plan


@pytest.mark.parametrize("case", SITE)
def test_a_recipe_runs_as_it_was_planned(case, tiny):
    made = tiny(case, steps=12, **LARGER[case])
    subject = made.look(jobs=JOBS[:1])
    extent = next(iter(near_sets(subject.grid)))
    near, tail = (Candidate(method, {"extent": extent}, 0.5) for method in ("brick", "tail"))
    plans = {key: plan_of_everything(near, tail, n) for n, key in enumerate(subject.layers())}
    recipe = recipe_of(plans, subject.levels, 4, list(plans), subject.made_for)
    with api.accelerated(made.model.pipe, recipe, strict=True) as handle:
        generate(made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed)
        plan, counted = handle.session.plan, handle.report().counters
    assert counted["brick"] > 0 and counted["tail"] > 0 and counted["anchor"] > 0 and counted["reuse"] > 0
    for key, own in plans.items():
        assert plan.attention[key].upgraded == 0
        for step, action in enumerate(own.actions):
            _check_step(plan, key, own, step, action)


def _check_step(plan, key, own, step, action):
    timeline = plan.timeline.get(key)
    if timeline is not None:
        names = [timeline.entry(step, branch).letters for branch in ("cond", "uncond")]
        assert names == {CC: ["C", "C"], CS: ["C", "s"], RS: ["r", "s"]}[action]
    if action == RS:
        return
    entry = plan.attention[key].entry(step, "cond")
    for head, pick in enumerate(own.picks[step]):
        method = next(m for m, heads in entry.groups if head in heads)
        feed = own.feeds[step][head]
        if feed is not None:
            assert type(method).__name__ == "Anchor" and method.anchors == feed.build(max_age=4)
        elif pick == FULL:
            assert type(method).__name__ == "Full"
        elif pick == REUSE:
            assert type(method).__name__ == "Reuse"
        else:
            assert type(method).__name__.lower() == pick.method


def test_blame_finds_the_steps_and_the_layer_that_matter():
    layers = {}
    for name in ("a", "b"):
        plan = LayerPlan.full(11, 2)
        for step in range(1, 11):
            plan.actions[step], plan.by_step[step] = RS, 1.0
        layers["transformer", name] = plan

    def measure(given):
        """Steps 3 and 4 of layer b cost all there is."""
        return sum(100.0 for step in (3, 4) if given["transformer", "b"].actions[step] == RS) + 1.0

    plan = PipelinePlan(1.0, layers, 20.0, 1.0)
    found = blame(plan, 11, measure)
    steps, by_layer = found.steps, found.layers
    guilty = next(part for part in ranges_of(11) if 3 in part)
    assert min(steps[guilty]) > 3.9 and steps[9] < 0.3
    assert by_layer["transformer", "b"] > 1.9 > 0.3 > by_layer["transformer", "a"]


def test_steps_that_are_made_full_still_feed_later_ones():
    plan = plan_of_everything(*(Candidate(m, {"extent": (0, 0, 0)}, 0.1) for m in ("brick", "tail")))
    freed = without_steps(plan, range(3, 6))
    assert freed.feeds == plan.feeds
    for step in range(12):
        inside = 3 <= step < 6
        assert freed.actions[step] == (CC if inside else plan.actions[step])
        assert freed.picks[step] == ([FULL] * 4 if inside else plan.picks[step])
        assert freed.follows[step] == ([False] * 4 if inside else plan.follows[step])


def searching(made, tmp_path, **more):
    subject = look(made.model, JOBS[:1], made.arguments)
    state = State(tmp_path / "plan.state.safetensors", {"model": "tiny"})
    return PlanSearch(subject, Goal("speedup", 1.6), state, Silent(), [].append, lambda: math.inf, **more)


@pytest.mark.parametrize("case", SITE)
def test_a_search_ends_with_a_recipe_that_runs(case, tiny, tmp_path):
    made = tiny(case, **LARGER[case])
    found = searching(made, tmp_path, tries=1 + (case == "wan")).find()
    assert found.plan.error > 0
    with api.accelerated(made.model.pipe, found.recipe, strict=True) as handle:
        generate(made.model, JOBS[1].prompt, made.arguments, JOBS[1].seed)
        assert handle.report().did_something


@pytest.mark.parametrize(
    ("came_to", "repaired", "kept"),
    [
        # (speedup, PSNR) of every plan generated; the repairs made before each; which one is kept
        ([(1.4, 50), (1.65, 40), (1.62, 44), (1.63, 39)], [0, 0, 1, 2], 2),
        ([(1.65, 40), (1.65, 39)], [0, 1], 0),
        ([(1.9, 30), (1.7, 40), (1.55, 45)], [0, 0, 1], 1),
        ([(1.4, 50)] * 6, [0] * 6, 0),
    ],
)
def test_repairs_begin_at_the_goal_and_end_where_they_do_not_help(
    came_to, repaired, kept, tiny, tmp_path, monkeypatch
):
    search = searching(tiny("wan", **LARGER["wan"]), tmp_path)
    two = Scales(2 * np.ones(len(search.subject.levels)), dict.fromkeys(search.layers, 1.0))
    plan = PipelinePlan(1.0, {}, 1.0, 1.0)
    asked: list[float] = []

    def tried(_plan, number):
        speedup, psnr = came_to[number]
        return Tried(Recipe.neutral(), plan, {"speedup": speedup, "psnr": psnr})

    monkeypatch.setattr(search, "measure", lambda: setattr(search.survey, "seconds", Seconds(2.0, 1.0, {})))
    monkeypatch.setattr(search, "planner", lambda scales: asked.append(float(scales.steps[0])))
    monkeypatch.setattr(search, "_aim", lambda planner: plan)
    monkeypatch.setattr(search, "_try", tried)
    monkeypatch.setattr(search, "_repair", lambda plan, number: two)
    best = search.find()
    assert [int(np.log2(factor)) for factor in asked] == repaired
    assert best is search.tried[kept] and len(search.tried) == len(came_to)


def test_a_search_that_was_killed_goes_on_with_what_it_measured(tiny, tmp_path, monkeypatch):
    made = tiny("wan", **LARGER["wan"])
    first = searching(made, tmp_path)
    first.measure()
    again = searching(made, tmp_path)
    for module in ("gains", "measuring", "probes", "timing"):  # nothing is measured twice
        monkeypatch.setattr(f"dit_accel.search.plan.{module}.generate", None)
    again.measure()
    assert np.array_equal(first.survey.weights, again.survey.weights)
    even = Scales.even(len(first.subject.levels), first.layers)
    plans = [each.planner(even).at(0.3) for each in (first, again)]
    assert plans[0].layers == plans[1].layers and plans[0].error == plans[1].error


def test_a_state_of_another_search_is_refused(tmp_path):
    file = tmp_path / "x.state.safetensors"
    state = State(file, {"model": "a"})
    state.once("dense", lambda: {"seconds": np.array([1.5])})
    assert State(file, {"model": "a"}).once("dense", lambda: pytest.fail("measured twice"))["seconds"] == [
        1.5
    ]
    with pytest.raises(BadUsage, match="model b"):
        State(file, {"model": "b"})
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(BadUsage, match="not the state of a search"):
        State(file, {"model": "a"})
