"""Measuring: what is timed, what is counted, and that nothing is left behind on the pipeline."""

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
        "warm-up, dense", "warm-up, recipe",
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
    real = measuring.generate

    def twice_as_fast(*given):
        sample = real(*given)
        accelerated = hasattr(model.pipe.transformer, "_diffusers_hook")
        share = 0.5 if accelerated else 1.0
        object.__setattr__(sample, "stages", {**sample.stages, "denoising": share})
        return sample

    monkeypatch.setattr(measuring, "generate", twice_as_fast)
    six = arguments | {"num_inference_steps": 6}
    result = compare(
        model, Recipe.neutral(), [Job("one", 0)], six, Options(rival_steps="auto", warm_up=False)
    )
    assert result.columns["rival"].steps == 3


def test_stages_add_up_and_leave_the_pipeline_as_it_was(model, arguments):
    before = dict(model.pipe.__dict__)
    heard = []
    sample = generate(model, "one", arguments, 0, lambda done, total: heard.append((done, total)))
    assert model.pipe.__dict__ == before
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
