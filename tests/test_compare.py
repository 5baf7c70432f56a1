"""Measuring: what is timed, what is counted, and that nothing is left behind on the pipeline."""

from dataclasses import replace

import pytest

from dit_accel import compare as measuring
from dit_accel.compare import Job, Options, compare
from dit_accel.generate import call_arguments, generate
from dit_accel.loading import Place, load
from dit_accel.recipe import Recipe
from dit_accel.stages import STAGES, stages


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(str(tiny_folder("wan")), Place(device="cpu"))


@pytest.fixture
def arguments(model):
    return call_arguments(model, {})


class Heard:
    def __init__(self) -> None:
        self.generations, self.steps = [], []

    def generation(self, done: int, total: int, what: str) -> None:
        self.generations.append((done, total, what))

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_columns_take_turns_and_warm_up_is_left_out(model, arguments):
    heard, jobs = Heard(), [Job("one", 0), Job("two", 1)]
    result = compare(model, Recipe.neutral(), jobs, arguments, Options(rival_steps=1), heard)
    assert [what for _, _, what in heard.generations] == [
        "warm-up, recipe", "warm-up, dense",
        "dense: one", "neutral: one", "dense, 1 steps: one",
        "dense, 1 steps: two", "neutral: two", "dense: two",
    ]  # fmt: skip
    assert {total for _, total, _ in heard.generations} == {8}
    assert all(len(column.seconds) == 2 for column in result.columns.values())
    assert result.columns["rival"].steps == 1


def test_neutral_is_identical_and_a_rival_is_not(model, arguments):
    result = compare(
        model, Recipe.neutral(), [Job("one", 0)], arguments, Options(rival_steps=1, warm_up=False)
    )
    assert result.columns["recipe"].psnr == [measuring.BEST_PSNR]
    assert result.columns["rival"].psnr[0] < measuring.BEST_PSNR
    assert result.as_dict()["psnr"] == measuring.BEST_PSNR


def test_counters_add_up_over_the_accelerated_runs(model, arguments):
    once = compare(model, Recipe.neutral(), [Job("one", 0)], arguments, Options(warm_up=False))
    twice = compare(model, Recipe.neutral(), [Job("one", 0), Job("two", 0)], arguments, Options())
    assert once.counters
    assert twice.counters == {name: 2 * count for name, count in once.counters.items()}


def test_the_automatic_rival_fits_into_the_time_of_the_recipe(model, arguments, monkeypatch):
    real, seconds = measuring.generate, iter([6.0, 3.0, 3.0])  # dense, recipe, rival

    def timed(*given):
        sample = real(*given)
        return replace(sample, stages={**sample.stages, "denoising": next(seconds)})

    monkeypatch.setattr(measuring, "generate", timed)
    six = arguments | {"num_inference_steps": 6}
    result = compare(
        model, Recipe.neutral(), [Job("one", 0)], six, Options(rival_steps="auto", warm_up=False)
    )
    assert result.columns["rival"].steps == 3


def test_a_rival_as_slow_as_the_recipe_is_left_out_and_said(model, arguments, monkeypatch):
    real = measuring.generate
    level = {"text_encoding": 0.0, "denoising": 1.0, "decoding": 0.0, "other": 0.0}
    monkeypatch.setattr(measuring, "generate", lambda *given: replace(real(*given), stages=level))
    options = Options(rival_steps="auto", warm_up=False)
    result = compare(model, Recipe.neutral(), [Job("one", 0)], arguments, options)
    assert "rival" not in result.columns
    assert any("not faster" in note for note in result.notes)


def test_stages_add_up_and_leave_the_pipeline_as_it_was(model, arguments):
    model.pipe(prompt="one", **arguments)  # diffusers itself leaves attributes behind at a first call
    before, heard = set(model.pipe.__dict__), []
    sample = generate(model, "one", arguments, 0, lambda done, total: heard.append((done, total)))
    assert set(model.pipe.__dict__) == before
    assert heard == [(1, 2), (2, 2)]
    assert sum(sample.stages[name] for name in STAGES) == pytest.approx(sample.seconds)
    assert all(sample.stages[name] > 0 for name in STAGES)


def test_a_failed_run_leaves_the_pipeline_as_it_was(model):
    before = dict(model.pipe.__dict__)
    with pytest.raises(RuntimeError, match="stop"), stages(model.pipe):
        raise RuntimeError("stop")
    assert model.pipe.__dict__ == before


def test_a_bar_over_items_counts_and_times_them(model):
    heard = []
    with stages(model.pipe, lambda done, total: heard.append((done, total))) as watch:
        assert list(model.pipe.progress_bar(range(3))) == [0, 1, 2]
    assert heard == [(1, 3), (2, 3), (3, 3)]
    assert watch.spent["denoising"] > 0
