"""Errors as the frames feel them, one price for all, and modules that need not run."""

import numpy as np
import pytest
import torch

from dit_accel.errors import BadUsage
from dit_accel.search.ditfastattn_v2 import search as ditfastattn_v2
from dit_accel.search.ditfastattn_v2.felt_error import FeltError
from dit_accel.search.ditfastattn_v2.modules import letters_of
from dit_accel.search.ditfastattn_v2.price import Price
from dit_accel.search.ditfastattn_v2.progressive import place_of
from dit_accel.search.plan.felt import Felt, Stream
from tests.search.conftest import JOBS, decide


def test_errors_of_both_branches_meet_in_the_guided_output():
    torch.manual_seed(1)
    heads, width, g = 3, 5, 4.0
    maps = [torch.randn(7, heads * width, dtype=torch.float64) for _ in range(2)]
    felt = Felt(*(Stream(x.T @ x) for x in maps), g)
    error = FeltError([felt], np.array([0.5]))
    c, u, text = (torch.randn(2, n, heads, width) + 3 for n in (11, 11, 4))

    def size(x, of):
        by_head = [x[:, :, h].double() @ of[:, h * width : (h + 1) * width].T for h in range(heads)]
        return np.array([float(x.square().sum()) / 2 for x in by_head])

    visual, own = maps
    assert error.of_cond(0, c, text) == pytest.approx(
        0.5 * (size(c, visual) + 16 * size(text, own)), rel=1e-5
    )
    both = 0.5 * (size(g * c + (1 - g) * u, visual) + 9 * size(text, own))
    assert error.of_uncond(0, u, text, c) == pytest.approx(both, rel=1e-5)
    # what both branches have wrong alike is felt once, whatever guidance is
    alike = error.of_uncond(0, c, text[:, :0], c)
    assert alike == pytest.approx(error.of_cond(0, c, text[:, :0]), rel=1e-5)
    assert error.of_uncond(0, u, text[:, :0], None) == pytest.approx(0.5 * 9 * size(u, visual), rel=1e-5)


def test_every_head_takes_what_is_least_at_the_price():
    errors = {"F": np.zeros(3), "x": np.array([0.5, 3.0, 0.1]), "r": np.array([2.0, 9.0, 0.8])}
    work = {"F": 1.0, "x": 0.5, "r": 0.0}
    price = Price(delta=5.0, around=2.0)  # of one head's work: 1
    assert price.choose(errors, work, {}) == "FFx"
    # the projections are worth 2: all together the heads may be 2 worse than what each takes by itself
    assert price.choose(errors, work, {"r": 4.59}) == "rrr"
    assert price.choose(errors, work, {"r": 4.61}) == "FFx"


@pytest.mark.parametrize(
    ("cond", "uncond", "joint", "wanted"),
    [
        ("FF rr FF", "FF rr ss", False, "CrC Crs"),
        ("FF rr FF", "FF ss ss", True, "CCC CCC"),  # text is computed, from cond's heads
        ("FF FF FF", "FF Fs rr", False, "CCC CCC"),  # the module's last output is not its heads' own
        ("FF FF FF FF", "FF Fs FF rr", False, "CCCC CCCr"),
        ("FF FF FF", "FF rr dd", False, "CCC Crd"),
        ("FF FF FF", "FF Fr dd", False, "CCC CCC"),  # the module's difference is newer than one head's
        ("FF rr rr", "FF dd ds", False, "CrC CdC"),  # a head reads cond's
    ],
)
def test_modules_that_need_not_run(cond, uncond, joint, wanted):
    assert " ".join(letters_of(cond.split(), uncond.split(), joint)) == wanted


@pytest.fixture(scope="module")
def wan(tiny):
    made = tiny("wan")
    return ditfastattn_v2.look(made.model, JOBS[:1], made.arguments, menu="ours", error="felt")


def test_shares_are_found_and_legal(wan):
    recipe, found = decide(wan, 1e-6)
    key = wan.layers()[0]
    # before text has had a say both branches are one: to copy the first layer's answer costs nothing
    assert all(text in ("ssss", "rrrr") for text in found.picks[place_of("uncond", key)][1:])
    letters = recipe.timeline["uncond"]["blocks.0.attn1"]
    assert letters[0] == "C" and set(letters[1:]) <= {"s", "r"} and "s" in letters
    assert not set("sd") & set(
        "".join("".join(row) for p, row in found.picks.items() if p.startswith("cond"))
    )
    again, _ = decide(wan, 1e-6)
    assert again.to_toml() == recipe.to_toml()


def test_at_no_price_nothing_is_wrong(wan):
    _, found = decide(wan, 1e-30)
    for place, row in found.picks.items():
        for step, text in enumerate(row):
            errors = found.errors[place].get(str(step), {})
            assert all((errors[x][h] or 0) < 1e-12 for h, x in enumerate(text) if x != "F")


def test_a_greater_delta_saves_more(wan):
    full = [
        sum(text.count("F") for row in decide(wan, d)[1].picks.values() for text in row) for d in (1e-9, 1)
    ]
    assert full[0] > full[1]


def test_what_is_felt_needs_guidance(tiny):
    made = tiny("wan", guidance_scale=1.0)
    with pytest.raises(BadUsage, match="guidance_scale above 1"):
        ditfastattn_v2.look(made.model, JOBS[:1], made.arguments, error="felt")
