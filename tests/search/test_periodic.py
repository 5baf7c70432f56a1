"""The periodic search: its candidates are legal, and it keeps the best that is fast enough."""

import pytest

from dit_accel import plan
from dit_accel.recipe import Recipe
from dit_accel.search.periodic import Period, periods, predicted_speedup, search
from dit_accel.sites import Denoiser

STEPS = 12


def test_letters_compute_at_both_ends_and_periodically_between():
    cond, uncond = Period(warm=2, rest=1, cond=2, uncond=2).letters(STEPS)
    assert cond == "CCrCrCrCrCrC"
    assert uncond == "CCsssCsssCsC"


def test_a_period_of_one_computes_everything():
    period = Period(warm=2, rest=1, cond=1, uncond=1)
    assert period.letters(STEPS) == ("C" * STEPS, "C" * STEPS)
    assert period.work(STEPS) == 1


def test_candidates_are_distinct_and_ordered_by_work():
    found = periods(STEPS)
    assert len({period.letters(STEPS) for period in found}) == len(found) > 10
    work = [period.work(STEPS) for period in found]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("period", periods(STEPS), ids=str)
def test_every_candidate_is_a_legal_plan(period):
    cond, uncond = period.letters(STEPS)
    choices = {
        "C": {"method": "compute"},
        "r": {"method": "reuse", "max_age": STEPS},
        "s": {"method": "share_branch", "max_age": STEPS},
    }
    tables = {"cond": {"blocks.0-3": cond}, "uncond": {"blocks.0-3": uncond}}
    recipe = Recipe.from_dict(
        {"schema": 1, "made_for": {"steps": STEPS}, "choices": choices, "timeline": tables}
    )
    blocks = tuple(f"blocks.{i}" for i in range(4))
    plan.check(recipe, (Denoiser("transformer", {}, {}, blocks),))


def test_predicted_speedup_counts_only_the_denoising():
    half = Period(warm=0, rest=0, cond=2, uncond=1)
    assert half.work(STEPS) == 0.5
    assert predicted_speedup(half, STEPS, denoising=1.0) == pytest.approx(2.0)
    assert predicted_speedup(half, STEPS, denoising=0.5) == pytest.approx(4 / 3)


def test_the_search_keeps_the_best_of_those_fast_enough(monkeypatch):
    from dit_accel.search import periodic

    class Measured:
        def __init__(self, recipe):
            timeline = "".join(row for rows in recipe.timeline.values() for row in rows.values())
            self.work = timeline.count("C") / len(timeline)
            # stored gates are worse on purpose
            self.quality = 20 + 20 * self.work - (recipe.choices["r"].parameters["gates"] == "stored")
            self.columns = {"recipe": self}

        def speedup(self):
            return 1 / self.work

        def mean(self, name):
            return self.quality

    from dit_accel.families.wan import WAN

    class Model:
        name, family = "tiny", WAN

        class pipe:
            class transformer:
                get_submodule = staticmethod(lambda name: [0] * 4)

    monkeypatch.setattr(periodic, "compare", lambda model, recipe, *_: Measured(recipe))
    found = search(Model, [], {}, STEPS, {"balanced": 1.5}, 1.0, lambda text: None)
    recipe, measured = found["balanced"]
    assert measured.speedup() >= 1.5
    assert recipe.choices["r"].parameters["gates"] == "current"
