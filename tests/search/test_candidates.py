"""Menus: what may follow what, histories as plans that do what they say, and published widths."""

from itertools import product

import pytest
import torch

from dit_accel.bricks import lay_bricks
from dit_accel.methods.attention.base import Anchor
from dit_accel.plan import resolve
from dit_accel.search.ditfastattn_v2.candidates import menu_of
from dit_accel.search.rows import recipe_of_rows
from dit_accel.sites import Denoiser

SITE = "transformer", "blocks.0.attn1"
DENOISER = Denoiser("transformer", {SITE[1]: 1}, {}, ("blocks.0",))
STEPS = 12
LEVELS = tuple(1 - step / STEPS for step in range(STEPS))
OURS = menu_of("ours", (1, 32, 16), STEPS, {})
V2 = menu_of("v2", (1, 64, 64), STEPS, {})


def histories(menu, letters, length):
    """Every legal history of these letters."""
    found = [""]
    for _ in range(length):
        found = [past + x for past, x in product(found, letters) if menu.legal(x, past)]
    return found


@pytest.mark.parametrize(("menu", "letters"), [(OURS, "Frytu"), (V2, "Frab")])
def test_every_legal_history_is_a_plan_that_does_what_it_says(menu, letters):
    for history in histories(menu, letters, 5):
        row = menu.row(history) + "F" * (STEPS - 5)
        rows = {branch: {SITE: list(row)} for branch in ("cond", "uncond")}
        plan = resolve(recipe_of_rows(rows, {}, menu.choices, LEVELS, {}, "x"), (DENOISER,), LEVELS)
        for step, pick in enumerate(history):
            entry = plan.entry("attention", SITE, step, "cond")
            method = entry.groups[0][0] if entry is not None else None
            if pick != "F":
                assert method == menu.of(pick).method, (history, step)
                continue
            reader = next((p for p in history[step + 1 :] if p in "Ftu"), "F")
            expected = None if reader == "F" else menu.of(reader).method
            assert (method.anchors if isinstance(method, Anchor) else None) == expected, (history, step)


def test_what_is_not_legal_would_compute():
    """The rules are no narrower than the library's: a pick that is refused runs as something else."""
    for history in histories(OURS, "Frytu", 4):
        for pick in "rtu":
            if OURS.legal(pick, history) or (pick in "tu" and set(history) & set("tu")):
                continue
            row = list(OURS.row(history + pick)) + ["F"] * (STEPS - 5)
            rows = {branch: {SITE: row} for branch in ("cond", "uncond")}
            plan = resolve(recipe_of_rows(rows, {}, OURS.choices, LEVELS, {}, "x"), (DENOISER,), LEVELS)
            assert plan.entry("attention", SITE, 4, "cond").groups[0][0] != OURS.of(pick).method


@pytest.mark.parametrize(
    ("menu", "pick", "history", "may"),
    [
        (V2, "r", "", False), (V2, "r", "--", False), (V2, "F", "--", True), (V2, "a", "", False),
        (V2, "r", "F" + "r" * 10, True), (OURS, "r", "Frr", False), (OURS, "r", "Fyrr", False),
        (OURS, "r", "Fr", True), (OURS, "r", "F--", False), (OURS, "t", "Fttt", True),
        (OURS, "t", "Ftttt", False), (OURS, "u", "Ft", False), (OURS, "u", "FtF", True),
        (OURS, "t", "Fyr", True), (OURS, "t", "Fy-t", True),
    ],
)  # fmt: skip
def test_ages(menu, pick, history, may):
    assert menu.legal(pick, history) is may


@pytest.mark.parametrize("grid", [(1, 128, 128), (1, 167, 83), (1, 130, 96)])
def test_a_published_band_is_an_arrow_of_half_width_v_over_2_f(grid):
    menu = menu_of("v2", grid, 20, {})
    visual = grid[1] * grid[2]
    for name, f in (("arrow_8", 8), ("arrow_16", 16), ("arrow_32", 32)):
        each = next(one for one in menu.candidates if one.name == name)
        near = each.method.near
        kept = lay_bricks(grid, 0, near.brick).within_tokens(near.radius)
        order = lay_bricks(grid, 0, near.brick).order
        assert torch.equal(order, torch.arange(visual))  # raster order, in blocks of whole rows
        block = near.brick[1] * near.brick[2]
        half = grid[1] * grid[2] // (2 * f) // grid[2] * grid[2]  # whole rows
        tokens = torch.arange(visual)
        row = tokens[::block] // grid[2]
        last = torch.clamp(tokens[::block] + block - 1, max=visual - 1) // grid[2]
        apart = torch.maximum(row[None] - last[:, None], row[:, None] - last[None]) * grid[2]
        assert torch.equal(kept, apart <= half)
        assert each.gain(visual, visual + 77, lambda: 0.0) == pytest.approx(
            (visual - visual / (2 * f)) ** 2 / (visual + 77) ** 2
        )


def test_a_reordered_band_has_all_frames_and_few_rows():
    menu = menu_of("v2", (21, 64, 52), 20, {})
    assert [each.name for each in menu.candidates] == [
        "reuse", "arrow_8", "arrow_16", "reorder_8", "reorder_16"
    ]  # fmt: skip
    near = menu.of("d").method.near
    layout = lay_bricks((21, 64, 52), 0, near.brick)
    assert menu.brick_on((21, 64, 52)) == near.brick == (1, 2, 52)
    kept = layout.within_tokens(near.radius)
    frame, row = layout.boxes[:, 0, 0], layout.boxes[:, 0, 1]
    assert kept[(frame[:, None] != frame[None]) & (row[:, None] == row[None])].all()
    assert not kept[
        (row[:, None] - row[None]).abs() > 2 + 2
    ].any()  # 4 rows on each side, and the block's own


def test_work_saved_by_ours_is_what_its_lists_leave_out():
    brick = next(each for each in OURS.candidates if each.name == "brick_own")
    assert brick.gain(512, 512, lambda: 0.25) == 0.75
    assert next(each for each in OURS.candidates if each.name == "reuse").gain(512, 512, lambda: 0.5) == 1.0


def test_what_keeps_everything_or_the_same_is_left_out():
    menu = menu_of("v2", (1, 16, 16), 20, {})
    assert [each.name for each in menu.candidates] == ["reuse", "arrow_16"]
    assert menu.left_out == (
        "arrow_8 keeps every block of (1, 16, 16) tokens: left out of the menu",
        "arrow_32 keeps the blocks of arrow_16 at (1, 16, 16) tokens: left out of the menu",
    )


def test_full_heads_have_the_backend_asked_for():
    menu = menu_of("v2", (1, 64, 64), 20, {"backend": "auto"})
    assert menu.full.backend == "auto" and menu.choices["F"] == {"method": "full", "backend": "auto"}


def test_plain_has_what_no_full_pass_stores_for():
    plain = menu_of("plain", (1, 32, 16), STEPS, {})
    anchored = {each.letter for each in OURS.anchored}
    assert anchored and not plain.anchored
    assert [each for each in OURS.candidates if each.letter not in anchored] == list(plain.candidates)
    assert not anchored & {x.lower() for x in plain.choices} - {"F"}
