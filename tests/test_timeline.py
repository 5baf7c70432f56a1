"""Letters laid over steps: what runs, what is kept, and what breaks a rule."""

import pytest

from dit_accel.errors import RecipeError
from dit_accel.methods.attention.full import Full
from dit_accel.methods.attention.residual import Residual
from dit_accel.methods.attention.tail import Tail
from dit_accel.methods.attention.window import Window
from dit_accel.methods.reuse.compute import Compute
from dit_accel.methods.reuse.reuse import Reuse
from dit_accel.methods.reuse.share_branch import ShareBranch
from dit_accel.timeline import Track, lay

METHODS = {
    "F": Full(),
    "w": Window((1, 1, 1)),
    "C": Compute(),
    "r": Reuse(max_age=2),
    "1": Reuse(max_age=1),
    "0": Reuse(max_age=0),
    "s": ShareBranch(difference=True, max_age=2),
    "c": ShareBranch(difference=False),
    "t": Tail(extent=(1, 1, 1), max_age=2),
    "u": Tail(extent=(0, 1, 1), max_age=2),
    "e": Residual(extent=(1, 1, 1), max_age=2),
    "T": Tail(extent=(1, 1, 1), max_age=0),
    "z": ShareBranch(difference=True, max_age=0),
}


def track(
    cond: str, uncond: str | None = None, *, strict: str | None = None, few: bool = False, runs=None
) -> Track:
    """One head over the steps; one letter a step."""
    letters = {"cond": tuple(cond), "uncond": tuple(cond if uncond is None else uncond)}
    return lay(letters, METHODS.get, strict, few, runs)


def ran(track: Track, branch: str = "cond") -> str:
    return "".join(entry.letters for entry in track.entries[branch])


def kept(track: Track, branch: str = "cond") -> list[str]:
    """Per step the first letters of the names kept: o(ut), s(hared), d(ifference)."""
    return ["".join(sorted(name[0] for name in entry.keep)) for entry in track.entries[branch]]


@pytest.mark.parametrize(
    ("asked", "runs", "keeps", "upgraded"),
    [
        ("FFFF", "FFFF", ["", "", "", ""], 0),
        ("FrFr", "FrFr", ["o", "", "o", ""], 0),
        ("FrrF", "FrrF", ["o", "", "", ""], 0),
        ("Frrr", "Frr.", ["o", "", "", ""], 2),  # the third is 3 steps old, max_age is 2
        ("rrrrr", ".rr.r", ["o", "", "", "o", ""], 4),  # refreshes itself
        ("11111", ".1.1.", ["o", "", "o", "", ""], 6),
        ("0000", "....", ["", "", "", ""], 8),
        ("Fwrr", "Fwrr", ["", "o", "", ""], 0),  # reuse takes the last that computed, also an approximation
        ("FFFr", "FFFr", ["", "", "o", ""], 0),
        (".r.r", ".r.r", ["o", "", "o", ""], 0),  # what the recipe leaves alone computes
    ],
)
def test_reuse(asked: str, runs: str, keeps: list[str], upgraded: int):
    found = track(asked)
    assert ran(found) == ran(found, "uncond") == runs
    assert kept(found) == kept(found, "uncond") == keeps
    assert found.upgraded == upgraded
    assert found.together and found.branches == ("both",)


@pytest.mark.parametrize(
    ("cond", "uncond", "runs_cond", "runs_uncond", "keeps_cond", "keeps_uncond"),
    [
        # with a difference: stored where both computed
        ("FFF", "Fss", "FFF", "Fss", ["s", "s", "s"], ["d", "", ""]),
        ("FFFF", "Fsss", "FFFF", "Fss.", ["s", "s", "s", ""], ["d", "", "", ""]),
        ("FFFFFF", "ssssss", "FFFFFF", ".ss.ss", ["s"] * 6, ["d", "", "", "d", "", ""]),
        ("FFF", "zzz", "FFF", "...", ["", "", ""], ["", "", ""]),
        # a plain copy needs cond at the same step and nothing older
        ("FFF", "ccc", "FFF", "ccc", ["s", "s", "s"], ["", "", ""]),
        ("FFF", "cFc", "FFF", "cFc", ["s", "", "s"], ["", "", ""]),
        # cond itself never shares
        ("ccc", "ccc", "...", "ccc", ["s", "s", "s"], ["", "", ""]),
        ("sss", "sss", "...", ".ss", ["s", "s", "s"], ["d", "", ""]),
        # cond reuses: what it answers can still be shared
        ("Frr", "Fss", "Frr", "Fss", ["os", "s", "s"], ["d", "", ""]),
        ("Frr", "ccc", "Frr", "ccc", ["os", "s", "s"], ["", "", ""]),
        # only uncond computes at step 1: the difference at step 2 is still that of step 0
        ("FrF", "FFs", "FrF", "FFs", ["os", "", "s"], ["d", "", ""]),
        # only one branch is named
        ("FFF", "...", "FFF", "...", ["", "", ""], ["", "", ""]),
        ("...", "Frr", "...", "Frr", ["", "", ""], ["o", "", ""]),
    ],
)
def test_sharing(cond, uncond, runs_cond, runs_uncond, keeps_cond, keeps_uncond):
    found = track(cond, uncond)
    assert (ran(found), ran(found, "uncond")) == (runs_cond, runs_uncond)
    assert (kept(found), kept(found, "uncond")) == (keeps_cond, keeps_uncond)


@pytest.mark.parametrize(
    ("cond", "uncond", "reason"),
    [
        ("rCC", None, 'here.toml:3: step 0 (cond) is "r", but nothing was computed before it'),
        ("Crrr", None, 'step 3 (cond) is "r", but the stored value is 3 steps old'),
        ("C0", None, 'step 1 (cond) is "0", but its max_age is 0'),
        ("CCC", "sCC", 'step 0 (uncond) is "s", but nothing was computed before it'),
        ("CCCC", "Csss", 'step 3 (uncond) is "s", but the stored value is 3 steps old'),
    ],
)
def test_explicit_letters_that_break_a_rule_are_errors(cond: str, uncond: str | None, reason: str):
    with pytest.raises(RecipeError) as caught:
        track(cond, uncond, strict="here.toml:3")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("here.toml:3: ")
    assert "raise the choice's max_age" in str(caught.value)


def test_explicit_letters_within_the_rules_are_taken_as_they_are():
    found = track("CrrCrC", "CrrCCs", strict="here.toml:3")
    assert (ran(found), ran(found, "uncond"), found.upgraded) == ("CrrCrC", "CrrCCs", 0)


def test_few_steps_compute_everything_that_would_be_stored():
    found = track("FrwrF", "Fswcc", few=True)
    assert ran(found) == "F.w.F"
    assert ran(found, "uncond") == "F.w.."
    assert found.upgraded == 5
    assert not found.slots


def test_few_steps_is_no_error_for_explicit_letters():
    assert ran(track("CrrC", few=True)) == "C..C"


def test_a_denoiser_reuses_only_what_it_ran_itself():
    """Wan 2.2: this denoiser takes over at step 3."""
    found = track("rrrrrrr", runs=dict.fromkeys(("cond", "uncond"), frozenset({3, 4, 5, 6})))
    assert ran(found) == "....rr."
    assert kept(found) == ["", "", "", "o", "", "", ""]
    assert found.upgraded == 4  # steps 3 and 6 of both branches; steps 0-2 are not this denoiser's


def test_a_branch_may_be_absent_by_itself():
    """Inside a span that uncond skips at steps 1 and 2."""
    found = track("FFFFF", "FsssF", runs={"cond": frozenset(range(5)), "uncond": frozenset({0, 3, 4})})
    assert ran(found, "uncond") == "F...F"  # at step 3 the difference of step 0 is too old
    assert kept(found, "uncond") == [""] * 5


def test_heads_are_grouped_by_method():
    letters = ("FwwF", "rwFr")
    found = lay({"cond": letters, "uncond": letters}, METHODS.get, None, False)
    first, second = found.entries["cond"]
    assert first.letters == "FwwF"
    assert first.groups == ((Full(), (0, 3)), (Window((1, 1, 1)), (1, 2)))
    assert first.keep == {"out": (0, 3)}
    assert second.groups == ((Reuse(2), (0, 3)), (Window((1, 1, 1)), (1,)), (Full(), (2,)))
    assert found.slots == {("cond", "out"): (0, 3), ("uncond", "out"): (0, 3)}


def test_heads_with_different_ages_store_the_union():
    letters = ("FF", "rF", "Fr")
    found = lay({"cond": letters, "uncond": letters}, METHODS.get, None, False)
    assert [entry.keep for entry in found.entries["cond"]] == [{"out": (0,)}, {"out": (1,)}, {}]
    assert found.slots["cond", "out"] == (0, 1)


def test_together_means_that_both_branches_do_the_same():
    assert track("FrF").together
    apart = track("FrF", "FFF")
    assert not apart.together and apart.branches == ("cond", "uncond")
    assert apart.entry(1, "cond").letters == "r" and apart.entry(1, "uncond").letters == "F"
    assert track("FrF").entry(1, "both").letters == "r"
    assert track("FFF", "...").together  # nothing is approximated: the pair stays whole


@pytest.mark.parametrize(("letters", "expected"), [("FF.", False), ("CC", False), ("Fw", True), ("Fr", True)])
def test_approximates(letters: str, expected: bool):
    assert track(letters).approximates is expected


@pytest.mark.parametrize(("letter", "computes"), [("F", True), ("w", True), (".", True), ("r", False)])
def test_computes(letter: str, computes: bool):
    assert track("F" + letter).entries["cond"][1].computes is computes


@pytest.mark.parametrize(
    ("asked", "runs", "keeps"),
    [
        ("ttttt", ".tt.t", ["tt", "", "", "tt", ""]),  # renews itself when it is over age
        ("FttFt", "F.tF.", ["", "tt", "", "", ""]),  # full stays the model's own call: it makes no anchor
        ("FtFtF", "F.FtF", ["", "tt", "", "", ""]),  # and touches none
        ("tFFFt", ".FFF.", ["", "", "", "", ""]),  # too old when read: nothing is kept
        ("ttuut", ".t.u.", ["tt", "", "tt", "", ""]),  # another near set needs its own far part
        ("tteet", ".t.e.", ["tt", "", "r", "", ""]),
        ("twt", ".wt", ["tt", "", ""]),  # a window does not touch it
        ("ttr", ".tr", ["tt", "o", ""]),  # reuse takes what a completed step gave
        ("trt", ".rt", ["ott", "", ""]),
        ("TTT", "...", ["", "", ""]),
    ],
)
def test_far_parts(asked: str, runs: str, keeps: list[str]):
    found = track(asked)
    assert ran(found) == ran(found, "uncond") == runs
    assert kept(found) == keeps
    anchors = [type(entry.groups[0][0]).__name__ == "Anchor" for entry in found.entries["cond"]]
    assert anchors == ["t" in names or "r" in names for names in keeps], "an anchor nobody reads is none"
    assert found.upgraded == 0


def test_few_steps_complete_nothing():
    found = track("tttt", few=True)
    assert ran(found) == "...." and not found.approximates


def test_an_anchor_stands_where_the_site_is_reached():
    reached = {"cond": frozenset({1, 2, 3}), "uncond": frozenset({2, 3})}
    found = track("tttt", runs=reached)
    assert ran(found) == "..tt" and ran(found, "uncond") == "...t"
    assert kept(found) == ["", "tt", "", ""] and kept(found, "uncond") == ["", "", "tt", ""]
