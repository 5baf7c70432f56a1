"""A recipe resolved against a pipeline and a schedule."""

import pytest

from dit_accel.errors import RecipeError
from dit_accel.plan import Plan, check, resolve
from dit_accel.recipe import Recipe
from dit_accel.sites import Denoiser

CHOICES = """
schema = 1
[made_for]
steps = 10
[choices]
F = { method = "full" }
w = { method = "window", radius = [1, 1, 1] }
r = { method = "reuse", max_age = 2 }
s = { method = "share_branch", max_age = 2 }
d = { method = "share_branch", max_age = 2, order = 1 }
P = { method = "forecast", order = 1, max_age = 2 }
L = { method = "fitted", order = 1, max_age = 2 }
C = { method = "compute" }
"""
LEVELS = tuple((10 - step) / 10 for step in range(10))


def denoiser(component: str = "transformer") -> Denoiser:
    return Denoiser(
        component=component,
        self_attention={f"blocks.{i}.attn1": 4 for i in range(4)},
        cross_attention={f"blocks.{i}.attn2": 4 for i in range(4)},
        blocks=tuple(f"blocks.{i}" for i in range(4)),
        others=tuple(f"blocks.{i}.ffn" for i in range(4)),
    )


def recipe(tables: str, head: str = CHOICES) -> Recipe:
    return Recipe.from_text(head + tables, source="my.toml")


def plan(tables: str, levels: tuple[float, ...] = LEVELS, **more) -> Plan:
    return resolve(recipe(tables), (denoiser(),), levels, **more)


def letters(found: Plan, seam: str, site: str, branch: str = "cond") -> list[str]:
    tracks = found.attention if seam == "attention" else found.timeline
    return [entry.letters for entry in tracks["transformer", site].entries[branch]]


def test_a_noise_interval_holds_its_lower_edge_only_where_the_next_begins():
    """At an edge the lower interval begins: 1.0 is the first, 0.6 already the second."""
    found = plan(
        '[noise]\nedges = [1.0, 0.6, 0.3, 0.0]\n[attention.both]\n"blocks.0.attn1" = ["F", "FFww", "w"]'
    )
    assert letters(found, "attention", "blocks.0.attn1") == ["FFFF"] * 4 + ["FFww"] * 3 + ["wwww"] * 3


def test_noise_levels_outside_the_edges_belong_to_the_ends():
    found = plan(
        '[noise]\nedges = [1.0, 0.5, 0.0]\n[attention.both]\n"blocks.0.attn1" = ["F", "w"]', (1.0, 0.2, 0.0)
    )
    assert letters(found, "attention", "blocks.0.attn1") == ["FFFF", "wwww", "wwww"]


def test_the_last_pattern_wins_and_a_branch_wins_over_both():
    found = plan(
        '[attention.uncond]\n"blocks.1.attn1" = ["wwww"]\n'
        '[attention.both]\n"blocks.*.attn1" = ["F"]\n'
        '"blocks.1-2.attn1" = ["wFFF"]\n"blocks.2.attn1" = ["FwFF"]'
    )
    assert letters(found, "attention", "blocks.0.attn1")[0] == "FFFF"
    assert letters(found, "attention", "blocks.1.attn1")[0] == "wFFF"
    assert letters(found, "attention", "blocks.1.attn1", "uncond")[0] == "wwww"
    assert letters(found, "attention", "blocks.2.attn1")[0] == "FwFF"


def test_a_branch_without_a_row_is_left_to_the_model():
    found = plan('[attention.uncond]\n"blocks.1.attn1" = ["wwww"]')
    assert letters(found, "attention", "blocks.1.attn1", "cond") == ["...."] * 10
    assert found.entry("attention", ("transformer", "blocks.0.attn1"), 0, "cond") is None


def test_reuse_on_attention_refreshes_itself():
    found = plan('[attention.both]\n"blocks.0.attn1" = ["FFrr"]')
    assert letters(found, "attention", "blocks.0.attn1") == ["FF..", "FFrr", "FFrr"] * 3 + ["FF.."]
    assert found.notes == ()  # as the recipe says: nothing to report


def test_a_timeline_of_the_made_step_count_is_taken_as_it_is():
    found = plan('[timeline.both]\n"blocks.1-2" = "CCrCrrCrrC"\n"blocks.3.attn1" = "CrCrCrCrCr"')
    assert letters(found, "timeline", "blocks.1-2") == list("CCrCrrCrrC")
    assert letters(found, "timeline", "blocks.3.attn1") == list("CrCrCrCrCr")
    assert found.spans["transformer", "blocks.1-2"].blocks == ("blocks.1", "blocks.2")
    assert found.notes == ()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (20, "CCCC..rrCC..rr..CC.."),
        (9, "CCrCrCrrC"),
    ],
)
def test_another_step_count_takes_the_letter_at_the_same_place(steps: int, expected: str):
    made, now = "CCrCrrCrrC", steps
    raw = "".join(made[min(9, int((k + 0.5) * 10 / now))] for k in range(now))
    found = plan(f'[timeline.both]\n"*" = "{made}"', tuple(1 - k / now for k in range(now)))
    ran = "".join(letters(found, "timeline", "*"))
    assert len(ran) == steps
    assert all(b in (a, ".") for a, b in zip(raw, ran, strict=True))
    assert f"the recipe was made for 10 steps and is mapped to {steps}" in found.notes


def test_mapping_never_keeps_a_reuse_beyond_its_age():
    found = plan('[timeline.both]\n"*" = "CrrCrrCrrC"', tuple(1 - k / 20 for k in range(20)))
    assert letters(found, "timeline", "*") == list("CCrr.rCCrr.rCCrr.rCC")
    assert found.notes == (
        "the recipe was made for 10 steps and is mapped to 20",
        "6 reuse or share entries became compute to stay within their max_age",
    )


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_few_steps_say_so_and_compute(steps: int):
    found = plan('[timeline.both]\n"*" = "CrrCrrCrrC"\n', tuple(1 - k / steps for k in range(steps)))
    assert not found.approximates
    assert f"{steps} steps are too few for reuse and sharing (limit 8): all compute" in found.notes


def test_nine_steps_are_not_few():
    assert plan('[timeline.both]\n"*" = "CrrCrrCrrC"\n', tuple(1 - k / 9 for k in range(9))).approximates


def test_few_steps_keep_a_window():
    found = plan('[attention.both]\n"blocks.0.attn1" = ["wwrr"]', (1.0, 0.5))
    assert letters(found, "attention", "blocks.0.attn1") == ["ww..", "ww.."]
    assert found.approximates


def test_two_denoisers_share_the_steps():
    both = (denoiser(), denoiser("transformer_2"))
    runs = {"transformer": frozenset(range(4)), "transformer_2": frozenset(range(4, 10))}
    found = resolve(recipe('[timeline.both]\n"*" = "CrrCrrCrrC"'), both, LEVELS, runs)
    first, second = (
        "".join(e.letters for e in found.timeline[name, "*"].entries["cond"])
        for name in ("transformer", "transformer_2")
    )
    assert first[:4] == "CrrC"
    assert second[4:] == ".rCrrC"  # step 4 asks to reuse what the other denoiser made
    assert "2 reuse or share entries became compute to stay within their max_age" in found.notes


def test_attention_inside_a_skipped_block_neither_runs_nor_stores():
    found = plan('[timeline.both]\n"blocks.1-2" = "CCrrCrrCCC"\n[attention.both]\n"blocks.*.attn1" = ["r"]')
    assert "".join(x[0] for x in letters(found, "attention", "blocks.0.attn1")) == ".rr.rr.rr."
    assert "".join(x[0] for x in letters(found, "attention", "blocks.1.attn1")) == ".r......rr"
    inside = found.attention["transformer", "blocks.1.attn1"].entries["cond"]
    assert [k for k, entry in enumerate(inside) if entry.keep] == [0, 7]


def test_a_prefix_restricts_to_one_denoiser():
    both = (denoiser(), denoiser("transformer_2"))
    found = resolve(recipe('[timeline.both]\n"transformer_2.blocks.1-2" = "CrrCrrCrrC"'), both, LEVELS)
    assert list(found.timeline) == [("transformer_2", "blocks.1-2")]
    assert list(found.spans) == [("transformer_2", "blocks.1-2")]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            '[attention.both]\n"blocks.9.attn1" = ["F"]',
            'my.toml:15: [attention.both] "blocks.9.attn1" matches no site of this pipeline; nearest: blo',
        ),
        (
            '[timeline.both]\n"blocks.1-6" = "CrrCrrCrrC"',
            "matches no site of this pipeline; nearest: blocks.1",
        ),
        ('[attention.both]\n"blocks.0.attn1" = ["FFw"]', '"FFw" has 3 letters, the site has 4 heads'),
        (
            '[attention.both]\n"blocks.0.attn1" = ["C"]',
            '"C" is compute, which works in [timeline], not in [attention]',
        ),
        (
            '[timeline.both]\n"*" = "wwwwwwwwww"',
            '"w" is window, which works in [attention], not in [timeline]',
        ),
        ('[attention.both]\n"blocks.0.attn2" = ["w"]', "blocks.0.attn2 is cross-attention"),
        ('[timeline.both]\n"*" = "rCCCCCCCCC"', 'step 0 (cond) is "r", but nothing was computed before it'),
        ('[timeline.both]\n"*" = "CrrrCCCCCC"', "the stored value is 3 steps old"),
        (
            '[timeline.both]\n"blocks.0-1" = "CrCrCrCrCr"\n"blocks.1-2" = "CrCrCrCrCr"',
            'spans "blocks.0-1" and "blocks.1-2" both hold blocks.1',
        ),
        (
            '[timeline.both]\n"*" = "CrCrCrCrCr"\n"blocks.1" = "CrCrCrCrCr"',
            "both hold blocks.1. Make them disjoint",
        ),
        (
            '[timeline.both]\n"blocks.1-2" = "CrCrCrCrCr"\n"blocks.2.ffn" = "CCCCCCCCCC"',
            'the span "blocks.1-2" around it replays it with gates = "current"',
        ),
        ('[attention.both]\n"blocks.0.attn1" = ["FFdd"]', "share_branch of order 1, which heads do not keep"),
        ('[timeline.both]\ndenoiser = "PCCCCCCCCC"', 'step 0 (cond) is "P", but nothing was computed'),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_anything_runs(tables: str, message: str):
    with pytest.raises(RecipeError) as caught:
        check(recipe(tables), (denoiser(),))
    assert str(caught.value).startswith("my.toml:")
    assert message in str(caught.value)


def test_the_letter_of_the_model_itself_cannot_be_declared():
    with pytest.raises(RecipeError):
        check(Recipe.from_text('schema = 1\n[choices]\n"." = { method = "full" }'), (denoiser(),))


def test_the_neutral_recipe_approximates_nothing():
    found = resolve(Recipe.neutral(), (denoiser(),), LEVELS)
    assert not found.approximates
    assert found.notes == ()
    assert len(found.attention) == 8 and list(found.spans) == [("transformer", "*")]


def test_explain_draws_every_site_and_branch():
    found = plan(
        '[timeline.both]\n"blocks.1-2" = "CrrCrrCrrC"\n[attention.uncond]\n"blocks.0.attn1" = ["FFww"]'
    )
    text = found.explain()
    assert "10 steps, noise level 1.000 to 0.100" in text
    assert "both    C r r C r r C r r C" in text
    assert "uncond  FFww FFww" in text
    assert "Window(radius=(1, 1, 1)" in text


def test_the_order_of_the_tables_in_the_file_does_not_matter():
    rows = ['[attention.cond]\n"blocks.0.attn1" = ["w"]\n', '[attention.both]\n"blocks.0.attn1" = ["F"]\n']
    one, other = plan("".join(rows)), plan("".join(rows[::-1]))
    assert letters(one, "attention", "blocks.0.attn1") == letters(other, "attention", "blocks.0.attn1")


FITTED = """[timeline.cond]
denoiser = "CCCLCCCCCC"
[timeline.uncond]
denoiser = "CCLLCCCCCC"
[weights]
levels = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
[weights.cond.denoiser]
3 = { c2 = 1.5, u1 = -0.5, x3 = 0.1 }
[weights.uncond.denoiser]
2 = { c2 = 1.0, u1 = 0.2 }
3 = { c2 = 1.5, u1 = -0.5, x0 = 0.1 }
"""


def test_fitted_answers_name_what_they_read_and_it_is_kept_until_then():
    track = plan(FITTED).timeline["transformer", "denoiser"]
    cond, uncond = track.entries["cond"], track.entries["uncond"]
    assert [(t.of, t.step, t.weight) for t in uncond[2].terms] == [("cond", 2, 1.0), ("uncond", 1, 0.2)]
    assert [sorted(entry.keep) for entry in cond[:5]] == [[], [], ["out"], ["input"], []]
    assert [sorted(entry.keep) for entry in uncond[:5]] == [["input"], ["out"], [], [], []]


@pytest.mark.parametrize("levels", [(*LEVELS[:-1], 0.05), tuple((12 - step) / 12 for step in range(12))])
def test_weights_of_another_schedule_give_way_to_a_forecast(levels: tuple[float, ...]):
    found = plan(FITTED, levels)
    assert any("not those its weights were fitted at" in note for note in found.notes)
    entries = found.timeline["transformer", "denoiser"].entries["cond"]
    assert {type(entry.groups[0][0]).__name__ for entry in entries} == {"Compute", "Forecast"}


def test_a_sum_of_what_was_not_computed_is_refused():
    with pytest.raises(RecipeError, match=r'step 3 \(uncond\) is "L", but uncond was not computed at step 2'):
        plan(FITTED.replace("3 = { c2 = 1.5, u1 = -0.5, x0 = 0.1 }", "3 = { u2 = 1.0 }"))


def test_inside_a_skipped_denoiser_nothing_is_computed():
    found = plan(FITTED.replace("CCLL", "CCCL") + '[timeline.both]\n"blocks.1.ffn" = "CCCCPCCCCC"')
    entry = found.timeline["transformer", "blocks.1.ffn"].entries["cond"][4]
    assert entry.letters == "P" and entry.sources == (2, 1)  # step 3 was answered from outside
