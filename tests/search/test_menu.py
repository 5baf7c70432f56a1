"""What may follow what, and that every legal history is a plan that does what its letters say."""

from itertools import product

import pytest

from dit_accel.errors import BadUsage
from dit_accel.methods.attention.base import Anchor
from dit_accel.methods.attention.residual import Residual
from dit_accel.plan import resolve
from dit_accel.search.ditfastattn import menu
from dit_accel.sites import Denoiser

SITE = "transformer", "blocks.0.attn1"
DENOISER = Denoiser("transformer", {SITE[1]: 2}, {}, ("blocks.0",))
LEVELS = tuple(1 - step / 12 for step in range(12))


def histories(length, guided=True):
    """Every legal history of this length."""
    found = [""]
    for _ in range(length):
        found = [h + p for h, p in product(found, "FRWSX") if menu.legal(p, h, guided)]
    return found


def test_the_first_step_is_full():
    assert histories(1) == ["F"] and not menu.legal("R", "--", True) and menu.legal("F", "--", True)


@pytest.mark.parametrize(
    ("pick", "history", "may"),
    [
        ("R", "F", True), ("R", "FRRR", True), ("W", "FRR", True), ("W", "FWW", True),
        ("X", "FXR", True), ("X", "FS", True), ("S", "FW", True),
        ("W", "FS", False), ("W", "FX", False), ("W", "FXRR", False), ("W", "FSR", False),
        ("W", "FXF", True), ("W", "-F-", True), ("W", "-FX-", False),
    ],
)  # fmt: skip
def test_a_window_of_uncond_needs_a_full_pass_after_the_last_share(pick, history, may):
    assert menu.legal(pick, history, guided=True) is may


def test_without_guidance_nothing_is_shared():
    assert {*"".join(histories(4, guided=False))} == {"F", "R", "W"}


@pytest.mark.parametrize("joint", [False, True], ids=["visual", "joint"])
def test_every_legal_history_is_a_plan_that_does_what_it_says(joint):
    near = menu.near_set("band", (1, 32, 16))
    for history in histories(5):
        rows = menu.rows_of(history, joint) + menu.idle(7)
        recipe = menu.recipe_of({SITE: rows}, LEVELS, near, {})
        # strict: a reuse or share that a rule forbids would raise
        plan = resolve(recipe, (DENOISER,), LEVELS)
        for step in range(5):
            for branch in ("cond", "uncond"):
                assert ran(plan, step, branch) == expected(history, step, branch, joint), (history, step)


def ran(plan, step, branch):
    """What the site does: the module's own answer, or what its heads do."""
    module = plan.entry("timeline", SITE, step, branch)
    if module is not None and not module.computes:
        return type(module.groups[0][0]).__name__
    heads = plan.entry("attention", SITE, step, branch)
    method = heads.groups[0][0] if heads is not None else None
    return "Full" if method is None else type(method).__name__


def expected(history, step, branch, joint):
    """The same from the meaning of the picks."""
    pick = history[step]
    if pick == "R":
        computed = history[:step].rstrip("R")
        return "ShareBranch" if branch == "uncond" and computed[-1] in "SX" and not joint else "Reuse"
    if branch == "uncond" and pick in "SX":
        return "ShareBranch"
    if pick in "WX":
        return Residual.__name__
    later = [p for p in history[step + 1 :] if p in ("FSWX" if branch == "cond" else "FW")]
    return Anchor.__name__ if later and later[0] in "WX" else "Full"


def test_a_window_reads_the_latest_full_pass_however_young_the_one_before():
    recipe = menu.recipe_of(
        {SITE: menu.rows_of("FWFW", joint=False) + menu.idle(8)},
        LEVELS,
        menu.near_set("brick", (1, 32, 16)),
        {},
    )
    plan = resolve(recipe, (DENOISER,), LEVELS)
    assert [ran(plan, step, "cond") for step in range(5)] == ["Anchor", "Residual"] * 2 + ["Full"]


def test_the_band_is_an_eighth_of_the_tokens_on_each_side():
    assert menu.near_set("band", (1, 32, 32)) == {
        "radius": (0, (0.0, 0.125), (0.0, 1.0)),
        "brick": (1, 4, 32),
    }
    assert menu.near_set("band", (21, 30, 52))["radius"] == ((0.0, 0.125), (0.0, 1.0), (0.0, 1.0))
    assert menu.near_set("band", (1, 64, 300))["brick"] == (1, 1, 128)


def test_steps_of_one_noise_level_cannot_be_told_apart():
    with pytest.raises(BadUsage, match="do not fall"):
        menu.recipe_of(
            {SITE: menu.rows_of("FRR", False)}, (1.0, 0.5, 0.5), menu.near_set("band", (1, 8, 8)), {}
        )
