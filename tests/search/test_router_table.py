"""A router's table: the recipe says what the scores say, thresholds reach goals, the page shows it."""

import json
import re

import numpy as np
import pytest

from dit_accel.errors import BadUsage
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.plan import resolve
from dit_accel.recipe import Recipe
from dit_accel.search.goal import Goal
from dit_accel.search.vorta import page as vorta_page
from dit_accel.search.vorta.table import compile_table, letters_of, pick_tau, taus
from dit_accel.sites import Denoiser
from dit_accel.train.vorta.branches import LETTERS, Branches, branches_of
from tests.search.conftest import never

BRANCHES = branches_of("published", False)


def table_of(steps=6, heads=3, seed=0):
    logits = np.random.default_rng(seed).normal(size=(2, steps, heads, 3)) * 1.5
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return {f"blocks.{layer}.attn1": scores[layer] for layer in range(2)}


@pytest.mark.parametrize("tau", [None, 0.5, 0.7])
def test_a_table_becomes_a_recipe_that_says_the_same(tau, tmp_path):
    table = table_of()
    for scores in table.values():
        scores[3] = scores[2]  # two steps alike: one interval
    levels = (1.0, 0.9, 0.75, 0.5, 0.3, 0.1)
    recipe = compile_table(table, levels, BRANCHES, {"family": "wan", "steps": 6}, tau)
    assert len(recipe.edges) == 6
    recipe.save(tmp_path / "vorta.toml")
    again = Recipe.from_file(tmp_path / "vorta.toml")
    denoiser = Denoiser("transformer", dict.fromkeys(table, 3), {}, ("blocks.0", "blocks.1"))
    plan = resolve(again, (denoiser,), levels)
    for site, scores in table.items():
        for step in range(6):
            by_hand = "".join(
                LETTERS[int(np.argmax(head))] if tau is None or head.max() >= tau else "F"
                for head in scores[step]
            )
            for branch in ("cond", "uncond"):
                assert plan.entry("attention", ("transformer", site), step, branch).letters == by_hand


@pytest.mark.parametrize("tau", [0.3, 1 / 3, 1.0, -1.0])
def test_a_threshold_that_changes_nothing_is_refused(tau):
    with pytest.raises(BadUsage, match=r"never below 1/3, and never 1. Give one between them"):
        compile_table(table_of(), (1.0, 0.9, 0.75, 0.5, 0.3, 0.1), BRANCHES, {"family": "wan"}, tau)


def test_the_page_shows_what_every_head_takes_at_every_step():
    table = table_of()
    shown = re.findall(
        r'class="(\w+)" x[^>]*><title>([\w.]+), head (\d), step (\d):',
        vorta_page._table(table, 0.5, (1, 1, 1)),
    )
    assert len(shown) == 2 * 6 * 3
    for colour, site, head, step in shown:
        assert colour == vorta_page.COLOURS[letters_of(table[site], 0.5)[int(step), int(head)]]


def test_thresholds_make_the_asked_shares_full():
    table = table_of(steps=20, heads=8)
    found = taus(table, (0.0, 0.25, 0.5, 0.75))
    assert found[0] is None and len(found) == 4
    every = np.concatenate([scores.reshape(-1, 3) for scores in table.values()])
    cheap = (letters_of(every, None) > 0).sum()
    for tau, share in zip(found[1:], (0.25, 0.5, 0.75), strict=True):
        assert (letters_of(every, tau) > 0).sum() / cheap == pytest.approx(1 - share, abs=0.02)
    certain_full = {"blocks.0.attn1": np.array([[[1.0, 0.0, 0.0]]])}
    assert taus(certain_full) == [None]


@pytest.mark.parametrize(
    ("kind", "value"), [(k, v) for k in ("speedup", "psnr") for v in (0, 1.25, 1.45, 9, 33, 99)]
)
def test_the_threshold_of_a_goal_is_the_best_there_is(kind, value):
    candidates = [None, 0.4, 0.5, 0.6, 0.7, 0.8]
    speeds, nearness = [1.6, 1.5, 1.4, 1.3, 1.2, 1.1], [20, 24, 28, 32, 36, 40]
    known = {t: {"speedup": s, "psnr": p} for t, s, p in zip(candidates, speeds, nearness, strict=True)}
    asked = []

    def measure(tau):
        asked.append(tau)
        return known[tau]

    goal = Goal(kind, value)
    tau, tried = pick_tau(goal, candidates, measure, never)
    reached = [t for t in candidates if known[t][kind] >= value]
    other = "psnr" if kind == "speedup" else "speedup"
    best = (
        max(reached, key=lambda t: known[t][other]) if reached else max(known, key=lambda t: known[t][kind])
    )
    assert tau == best and len(asked) == len(set(asked)) == len(tried) <= 4
    assert pick_tau(goal, candidates, measure, lambda: True)[0] is None  # the budget ended after the first


def test_the_choices_of_a_recipe_are_the_published_ones():
    assert branches_of("published", True).choices()["c"] == {
        "method": "coreset", "queries": "selected", "reweight": False,
    }  # fmt: skip
    assert BRANCHES.choices()["c"]["keys"] == "as_queries"
    assert branches_of("keys", False).choices()["c"] == {"method": "coreset"}
    assert BRANCHES.choices()["F"] == {"method": "full"}
    assert branches_of("keys", False, {"backend": "auto"}).choices()["F"]["backend"] == "auto"
    assert BRANCHES.choices()["t"] == {"method": "brick", "extent": (1, 1, 1)}
    assert Branches(Coreset()).coreset.kept == 6 and json.dumps(BRANCHES.choices())
