"""MoA's rules: told apart by sizes, assigned under a bound at each, good at a size that was not seen."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from dit_accel import api
from dit_accel.block_heads import Near
from dit_accel.bricks import best_brick, lay_bricks, reach
from dit_accel.errors import BadUsage
from dit_accel.generate import call_arguments, generate
from dit_accel.loading import Place, load
from dit_accel.metrics import psnr
from dit_accel.prompts import jobs
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal
from dit_accel.search.moa.command import check_bound, open_search, sizes_of
from dit_accel.search.moa.rules import MOST, axis_rules, elastic_rules, menu_at
from dit_accel.search.moa.search import Tried
from dit_accel.search.moa.solving import assign, foretold, fronts, weightings
from dit_accel.search.moa.writing import LETTERS
from dit_accel.search.outcome import Ending
from dit_accel.search.pursuit import Clock
from tests.search.conftest import JOBS
from tests.search.plan.test_plans import Silent

GRIDS = ((5, 16, 16), (9, 12, 12))  # toys/wan at 64 x 64, 17 frames and 48 x 48, 33 frames


@pytest.mark.parametrize("counts", [(2, 3), (4, 3), (1, 1), (2, 2), (7, 8, 12)])
def test_rules_of_an_axis_are_told_apart_by_its_sizes(counts):
    rules = axis_rules(counts)
    kept = [tuple(min(reach(rule, n), n - 1) for n in counts) for rule in rules]
    assert len(set(kept)) == len(kept)
    assert rules[0] == (0.0, 1.0)  # all of an axis stays all of it at a size nobody saw
    assert all((n,) * len(counts) in kept for n in range(min(counts)))  # every whole number
    if len(set(counts)) > 1:
        assert any(isinstance(rule, tuple) and rule != (0.0, 1.0) for rule in rules)


def test_rules_that_keep_the_same_blocks_are_one():
    rules = elastic_rules(GRIDS)
    masks = [
        b"".join(lay_bricks(g, 0, best_brick(g)).within_bricks(r).numpy().tobytes() for g in GRIDS)
        for r in rules
    ]
    assert len(set(masks)) == len(rules) > 10
    assert all(min(Near(extent=r).density(g) for g in GRIDS) <= 0.95 for r in rules)


def test_great_grids_have_no_more_rules_than_letters():
    rules = elastic_rules([(21, 30, 52), (13, 45, 80)])  # Wan at 480p, 81 frames and at 720p, 49 frames
    assert 30 < len(rules) <= MOST == len(LETTERS) == len(set(LETTERS))
    assert any(rule[0] == (0.0, 1.0) for rule in rules) and any(rule[0] == 0 for rule in rules)


@pytest.mark.parametrize("text", [0, 37])
def test_a_menu_has_each_set_of_blocks_once_and_every_rule_its_own(text):
    rules = elastic_rules(GRIDS)
    for grid in GRIDS:
        menu, places = menu_at(rules, grid, text)
        assert len({each.parameters["extent"] for each in menu}) == len(menu) < len(rules)
        for rule, place in zip(rules, places, strict=True):
            layout = lay_bricks(grid, text, best_brick(grid))
            own = layout.within_bricks(rule)
            assert own.equal(layout.within_bricks(menu[place].parameters["extent"]))
            assert menu[place].density == pytest.approx(float(own.float().mean()))


def table(seed, sizes, units, choices):
    draw = np.random.default_rng(seed)
    work = np.concatenate([np.ones((sizes, 1)), draw.uniform(0.1, 0.9, (sizes, choices))], axis=1)
    # what attends less is wronger, on scales that differ from size to size by orders
    errors = draw.lognormal(0, 1, (sizes, units, choices + 1)) * (1 - work)[:, None]
    shares = draw.uniform(0.5, 2, units)
    return errors * 10.0 ** draw.uniform(-3, 3, (sizes, 1, 1)), work, shares / shares.sum()


@pytest.mark.parametrize("seed", range(6))
def test_an_assignment_is_the_best_there_is(seed):
    sizes, units, choices = 2 + seed % 2, 5, 3
    errors, work, shares = table(seed, sizes, units, choices)
    for weights in weightings(sizes):
        chosen = assign(errors, work, shares, 0.6, weights)
        size_of = errors.max(axis=2).sum(axis=1)

        def cost(picks, weights=weights, size_of=size_of):
            return float((weights * foretold(errors, picks) / size_of).sum())

        fitting = [
            picks
            for picks in itertools.product(range(choices + 1), repeat=units)
            if all((shares * work[size, list(picks)]).sum() <= 0.6 + 1e-9 for size in range(sizes))
        ]
        assert tuple(chosen) in fitting
        assert cost(chosen) == pytest.approx(min(map(cost, fitting)), rel=1e-3)


def test_what_cannot_be_is_not_assigned():
    errors, work, shares = table(2, 2, 6, 3)
    weights = np.array([0.5, 0.5])
    before = assign(errors, work, shares, 0.6, weights)
    unit = int(np.flatnonzero(before)[0])
    errors[1, unit, before[unit]] = np.inf
    after = assign(errors, work, shares, 0.6, weights)
    assert after[unit] != before[unit] and np.isfinite(foretold(errors, after)).all()


def test_the_front_has_no_solution_that_another_beats_everywhere():
    errors, work, shares = table(3, 3, 40, 5)
    found = [foretold(errors, chosen) for chosen in fronts(errors, work, shares, 0.5)]
    assert 1 < len(found) <= 4
    for one, other in itertools.permutations(found, 2):
        assert not (one < other * (1 - 1e-3)).all()
    alike = np.stack([errors[0]] * 3), np.stack([work[0]] * 3)
    assert len(fronts(*alike, shares, 0.5)) == 1  # sizes that agree have one solution


def test_a_bound_that_no_rules_reach_is_refused():
    errors, work, shares = table(1, 2, 4, 2)
    with pytest.raises(BadUsage, match=r"asked to keep 1\.0% of the attention's work; the rules .* at least"):
        assign(errors, work, shares, 0.01, np.array([0.5, 0.5]))


TARGETS = {
    "wan": {"height": 192, "width": 256, "num_frames": 13},
    "pixart_sigma": {"height": 512, "width": 256},
}
SIZES = {"wan": ["192x128x13", "128x256x5"], "pixart_sigma": ["256x256", "512x128"]}


def searching(made, tmp_path, sizes, **more):
    ending = Ending(JOBS[:1], JOBS[1:], "dit-accel search")
    goals = dict.fromkeys(("speedup", "psnr"))
    settings = {"sizes": sizes, "density": 0.7, "interval": 4, **more}
    file = tmp_path / "moa.toml"
    return open_search(
        made.model, made.arguments, ending, goals, Clock(), file, settings, Silent(), [].append
    )


@pytest.mark.parametrize("case", TARGETS)
def test_rules_found_at_two_sizes_run_at_a_third(case, tiny, tmp_path):
    made = tiny(case, **TARGETS[case])
    search = searching(made, tmp_path, SIZES[case])
    best = search.find()
    assert best.recipe.made_for.grid is None
    for subject in (*search.calibrated, search.target):
        with api.accelerated(made.model.pipe, best.recipe, strict=True) as handle:
            generate(made.model, JOBS[1].prompt, subject.arguments, JOBS[1].seed)
            report = handle.report()
        assert report.counters["brick"] > 0
        if subject is not search.target:
            assert report.attention_kept <= 0.7 + 1e-6


@pytest.mark.parametrize(
    ("goal", "wanted"), [(Goal("speedup", 1.5), 0.5), (Goal("psnr", 30.0), 0.6), (Goal("speedup", 9.0), 0.3)]
)
def test_a_goal_is_reached_by_the_bound(goal, wanted, tiny, tmp_path, monkeypatch):
    """Less work is faster and farther from dense; below 0.28 there are no rules."""
    search = searching(tiny("wan", **TARGETS["wan"]), tmp_path, SIZES["wan"])
    search.goal = goal
    asked = []

    def solutions(bound):
        asked.append(bound)
        if bound < 0.28:
            raise BadUsage("no rules keep so little")
        return [({}, [0.0])]

    def tried(bound, assigned, errors):
        measured = {"speedup": 2.0 - bound, "psnr": 50.0 * bound}
        search.tried.append(Tried(Recipe.neutral(), assigned, bound, errors, measured))
        return search.tried[-1]

    for name, stub in (("measure", lambda: None), ("solutions", solutions), ("_try", tried)):
        monkeypatch.setattr(search, name, stub)
    monkeypatch.setattr(search, "_out_of_time", lambda: False)
    best = search.find()
    assert abs(best.bound - wanted) < 0.07 and len(asked) <= 7
    if goal.value < 9:
        assert goal.reached(best.measured)


@pytest.mark.parametrize("case", ["wan"])
def test_foretold_errors_are_those_of_the_heads_that_run(case, tiny, tmp_path):
    """An assignment's table against the survey's own, unit by unit."""
    search = searching(tiny(case, **TARGETS[case]), tmp_path, SIZES[case])
    search.measure()
    assigned, errors = search.solutions(0.7)[0]
    for size, survey in enumerate(search.surveys):
        by_hand = 0.0
        for key, rows in assigned.items():
            for step in range(len(search.target.levels)):
                for head, rules in enumerate(rows[step // 4]):
                    if rules is None:
                        continue
                    menu, places = search.menus[size]
                    candidate = menu[places[search.rules.index(rules)]]
                    by_hand += float(
                        survey.noted[0][key].pair[candidate][step, head] * survey.weights[0, step]
                    )
        assert errors[size] == pytest.approx(by_hand)
    heads = {key: search.target.attention(key).heads for key in search.target.layers()}
    assert {key: [len(row) for row in rows] for key, rows in assigned.items()} == {
        key: [count] * math.ceil(len(search.target.levels) / 4) for key, count in heads.items()
    }
    _check_what_cannot_be(search, assigned)
    again = searching(tiny(case, **TARGETS[case]), tmp_path, SIZES[case])  # goes on from the state files
    for survey in again.surveys:
        survey.state.once = lambda group, measure, kept=survey.state: kept.groups[group]
    again.measure()
    assert again.solutions(0.7)[0][0] == assigned


def _check_what_cannot_be(search, assigned):
    """What was refused at one size is in no solution; steps that a layer does not run are no work."""
    first, second = search.target.layers()
    used = next(rules for row in assigned[first] for rules in row if rules is not None)
    candidate = search.menus[1][0][search.menus[1][1][search.rules.index(used)]]
    search.surveys[1].noted[0][first].pair[candidate][2:] = np.inf
    for survey in search.surveys:
        for table in survey.noted[0][second].pair.values():
            table[4:] = np.inf  # the first of its intervals is all that runs
    for name in ("weighed", "shares", "errors"):
        vars(search).pop(name)
    fewer, errors = search.solutions(0.95)[0]
    same = [
        r
        for r, place in zip(search.rules, search.menus[1][1], strict=True)
        if search.menus[1][0][place] == candidate
    ]
    assert not {rules for row in fewer[first] for rules in row} & set(same) and np.isfinite(errors).all()
    shares = dict(zip(search.units, search.shares, strict=True))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[second, 1, 0] == 0 < shares[second, 0, 0] == shares[first, 0, 0]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["64"], 'at --sizes "64"; a size is HEIGHTxWIDTH or'),
        (["64x64x17x2"], "Write it so"),
        (["0x64"], "Write it so"),
        ([], "no size to calibrate at was given"),
    ],
)
def test_sizes_are_read_or_refused(texts, words):
    with pytest.raises(BadUsage, match=words):
        sizes_of(texts)
    assert sizes_of(["48x64", "48x64x9"]) == [
        {"height": 48, "width": 64},
        {"height": 48, "width": 64, "num_frames": 9},
    ]


@pytest.mark.parametrize(
    ("sizes", "more", "words"),
    [
        (["192x128x13", "192x128x13"], {}, "rules are told apart by sizes that differ"),
        (["192x256x13", "192x128x13"], {}, "chosen at one that was not calibrated"),
        (["192x128x13", "191x128x13"], {}, "Change the argument it names"),
        (["64x64x17"], {"full": "mine"}, 'full heads by "mine"; known: model, auto'),
        (["64x64x17"], {"sites": ["blocks.9.attn1"]}, "no self-attention here"),
    ],
)
def test_what_cannot_be_searched_is_refused(sizes, more, words, tiny, tmp_path):
    made = tiny("wan", **TARGETS["wan"])
    with pytest.raises(BadUsage, match=words):
        searching(made, tmp_path, sizes, **more)
    assert not [*tmp_path.iterdir()]


def test_frames_of_a_picture_are_refused(tiny, tmp_path):
    with pytest.raises(BadUsage, match="takes no num_frames"):
        searching(tiny("pixart_sigma", **TARGETS["pixart_sigma"]), tmp_path, ["128x128x9"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"speedup": 1.5, "density": 0.5}, "by --speedup 1.5 and --density 0.5. Give one"),
        ({"density": 1.5}, "--density 1.5; it must be over 0 and under 1"),
        ({"psnr": 0.0}, "--psnr 0; it must be over 0"),
    ],
)
def test_a_goal_is_one_and_in_reach(given, words):
    goals = {name: given.get(name) for name in ("speedup", "psnr")}
    with pytest.raises(BadUsage, match=words):
        check_bound(given.get("density"), goals)
    assert check_bound(0.5, dict.fromkeys(("speedup", "psnr"))) is None
    assert check_bound(None, {"speedup": 1.5, "psnr": None}).value == 1.5


def test_rules_of_other_sizes_are_as_good_as_those_of_this_one():
    """Both are of `--method moa` on toys/wan; here they run at 64 x 64, 33 frames, on fresh prompts."""
    model = load("toys/wan", Place("cpu"))
    arguments = call_arguments(model, {})
    every = jobs(model, None, 2, 1500)
    dense = [generate(model, job.prompt, arguments, job.seed).frames for job in every]
    quality, kept = {}, {}
    for name in ("elsewhere", "here"):
        recipe = Recipe.from_file(Path(__file__).parent / "moa" / f"{name}.toml")
        own = (9, 16, 16) in recipe.made_by["calibrated_at"]
        assert own == (name == "here") and recipe.made_by["chosen_at"] == (9, 16, 16)
        with api.accelerated(model.pipe, recipe, strict=True) as handle:
            frames = [generate(model, job.prompt, arguments, job.seed).frames for job in every]
            kept[name] = handle.report().attention_kept
        quality[name] = np.mean([psnr(one, other) for one, other in zip(frames, dense, strict=True)])
    assert kept["elsewhere"] <= kept["here"] + 0.01
    assert quality["elsewhere"] >= quality["here"] - 1.0
    assert quality["elsewhere"] > 25.0
