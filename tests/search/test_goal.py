"""The deltas a goal leads to, on a made-up trade of speed for quality, and goals that are refused."""

import math

import pytest

from dit_accel.errors import BadUsage
from dit_accel.search.goal import Goal, check_goal, pursue

START = 3e-4


def trade(delta):
    """Faster and worse with delta: 1.3x and 30 dB at 0.01."""
    return {"speedup": 1.3 + 0.1 * math.log10(delta / 0.01), "psnr": 30 - 10 * math.log10(delta / 0.01)}


def never():
    return False


def test_a_speedup_is_reached_with_little_more_than_it_takes():
    chosen, tried = pursue(Goal("speedup", 1.3), trade, never, START, tries=8)
    assert 0.01 <= chosen < 0.013 and trade(chosen)["speedup"] >= 1.3
    assert chosen == min(delta for delta in tried if trade(delta)["speedup"] >= 1.3)


def test_a_quality_is_kept_and_what_it_allows_is_used():
    chosen, tried = pursue(Goal("psnr", 30.0), trade, never, START, tries=8)
    assert 0.0075 < chosen <= 0.01
    assert chosen == max(delta for delta in tried if trade(delta)["psnr"] >= 30)


def test_out_of_reach_the_nearest_is_taken():
    assert pursue(Goal("speedup", 9.0), trade, never, START)[0] == max(
        pursue(Goal("speedup", 9.0), trade, never, START)[1]
    )
    chosen, tried = pursue(Goal("psnr", 99.0), trade, never, START)
    assert chosen == min(tried)


def test_a_budget_ends_the_pursuit_with_what_was_measured():
    asked = []
    chosen, tried = pursue(
        Goal("speedup", 1.3), lambda d: asked.append(d) or trade(d), lambda: len(asked) == 2, START
    )
    assert len(tried) == 2 and chosen in tried


def test_a_delta_is_searched_once():
    assert pursue(Goal("delta", 0.02), lambda delta: {}, never, START) == (0.02, {0.02: {}})


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "found none of them"),
        ({"delta": 0.1, "psnr": 30.0}, "found --delta 0.1 and --psnr 30.0"),
        ({"delta": 0.0}, "over 1e-09 and under 10"),
        ({"speedup": 1.0}, "over 1 and under 20: the first of 20 steps"),
        ({"speedup": 20.0}, "over 1 and under 20"),
        ({"psnr": 100.0}, "over 0 and under 100"),
        ({"delta": math.nan}, "asked for --delta nan"),
    ],
)
def test_a_goal_that_is_none_is_refused(asked, words):
    with pytest.raises(BadUsage, match=words):
        check_goal(**{"delta": None, "speedup": None, "psnr": None} | asked, steps=20)
