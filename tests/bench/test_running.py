"""A bench on a tiny pipeline: the order, the rows, crashes, and what nothing may hide."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from dit_accel import api
from dit_accel.bench import running
from dit_accel.bench.form import Form
from dit_accel.bench.rivals import RIVALS, Rival
from dit_accel.bench.running import Asked, Benching, check_recipes
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.generate import call_arguments, generate
from dit_accel.loading import load
from dit_accel.recipe import Recipe

EAGER = Form("float32")
REUSE = """
schema = 1
[choices]
C = { method = "compute" }
R = { method = "reuse" }
[timeline.both]
"blocks.0-1" = "CCRCRCRCRC"
[made_for]
steps = 10
family = "wan"
"""


class Heard:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.totals: list[tuple[int, int]] = []

    def generation(self, done: int, total: int, what: str) -> None:
        self.said.append(what.partition(":  ")[0])
        self.totals.append((done, total))

    def step(self, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def wan(tiny_folder):
    return load(str(tiny_folder("wan")))


def bench_of(
    model: Any, against: Any, recipes: Any = (), prompts: int = 1, warm_up: bool = False, steps: int = 6
):
    jobs = [Job(f"a red fox {index}", index) for index in range(prompts)]
    arguments = call_arguments(model, {"steps": steps})
    asked = Asked(against, recipes, jobs, Job("a calm sea", 99), warm_up)
    return Benching(model, arguments, EAGER, asked)


def ran(benching: Benching) -> dict[str, Any]:
    benching.run(Heard())
    return benching.result.as_dict()


def rows_of(measured: dict[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in measured["rows"]}


def test_rows_have_speed_beside_quality_and_the_work_that_ran(wan):
    recipe = Recipe.from_text(REUSE, name="mine")
    against = [("steps", 3), ("first_block_cache", 0.9), ("mag_cache", 0.3), ("pab", None)]
    measured = ran(bench_of(wan, against, [recipe], prompts=2, steps=10))
    rows = rows_of(measured)
    assert list(rows) == ["dense", "steps:3", "first_block_cache:0.9", "mag_cache:0.3", "dit_accel:mine"]
    for name, row in rows.items():
        assert row["error"] is None and row["runs"] == 2, name
        assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["peak_bytes"] > 0 and -1 <= row["ssim"] <= 1
    assert rows["dense"]["speedup"] == rows["dense"]["work"] == 1 and rows["dense"]["psnr"] == 100
    assert rows["steps:3"]["work"] == pytest.approx(0.3) and rows["steps:3"]["steps"] == 3
    assert 0 < rows["first_block_cache:0.9"]["work"] < 1 and rows["first_block_cache:0.9"]["psnr"] < 100
    assert rows["mag_cache:0.3"]["calibration_seconds"] > 0
    assert rows["dit_accel:mine"]["counters"]["reuse"] > 0 and rows["dit_accel:mine"][
        "work"
    ] == pytest.approx(0.6)
    assert "guidance" in measured["left_out"]["pab"]
    assert measured["seeds"] == [0, 1] and measured["shape"]["steps"] == 10 and measured["interleaved"] == 5


def test_the_order_turns_and_every_prompt_runs_every_column(wan):
    benching, heard = bench_of(wan, [("steps", 2), ("steps", 3)], prompts=3, warm_up=True), Heard()
    benching.run(heard)
    names = [said.removeprefix("warm-up, ").partition(": a ")[0] for said in heard.said]
    assert names[:3] == ["dense", "steps:2", "steps:3"]  # warm-up
    assert names[3:] == [
        *("dense", "steps:2", "steps:3"),
        *("steps:3", "dense", "steps:2"),
        *("steps:2", "steps:3", "dense"),
    ]
    assert heard.totals == [(done, 12) for done in range(12)]
    assert benching.result.dense.psnr == [100.0] * 3
    assert all(len(column.ratios) == 3 for column in benching.result.columns)


def test_the_ratio_is_to_the_dense_run_of_the_same_prompt(wan, monkeypatch):
    spent = iter([8.0, 2.0, 4.0, 6.0])  # dense, steps, then steps, dense
    real = generate

    def timed(*args: Any) -> Any:
        return dataclasses.replace(real(*args), seconds=next(spent))

    monkeypatch.setattr(running, "generate", timed)
    row = rows_of(ran(bench_of(wan, [("steps", 2)], prompts=2)))["steps:2"]
    assert row["speedup"] == pytest.approx((8 / 2 + 6 / 4) / 2) and row["seconds"] == 3


def test_a_crash_is_a_row_and_the_others_go_on(wan, monkeypatch):
    def crash(scene: Any, setting: Any) -> None:
        RIVALS["first_block_cache"].switch_on(scene, 0.9)
        raise IndexError("list index out of range\nmore")

    monkeypatch.setitem(RIVALS, "pab", Rival("pab", (2,), crash, lambda scene: None))
    measured = ran(bench_of(wan, [("pab", None), ("steps", 3)], prompts=2, warm_up=True))
    rows = rows_of(measured)
    assert rows["pab:2"] == {"name": "pab:2", "steps": 6, "error": "IndexError: list index out of range"}
    assert rows["steps:3"]["runs"] == rows["dense"]["runs"] == 2 and rows["dense"]["work"] == 1


def test_a_failed_calibration_is_an_error_in_its_rows(wan, monkeypatch):
    def crash(scene: Any, run: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setitem(RIVALS, "mag_cache", dataclasses.replace(RIVALS["mag_cache"], calibrate=crash))
    rows = rows_of(ran(bench_of(wan, [("mag_cache", 0.1), ("steps", 2)])))
    assert rows["mag_cache:0.1"]["error"] == "calibration: ValueError: no"
    assert rows["steps:2"]["error"] is None


def test_a_peer_that_changed_nothing_is_told(wan):
    rows = rows_of(ran(bench_of(wan, [("first_block_cache", 1e-9)], [Recipe.load("neutral")])))
    for name in ("first_block_cache:1e-09", "dit_accel:neutral"):
        assert rows[name]["changed_nothing"] is True and rows[name]["work"] == 1
        assert any("changed nothing" in note for note in rows[name]["notes"])
    assert "changed_nothing" not in rows["dense"]


def test_the_pipeline_is_as_before(wan):
    arguments = call_arguments(wan, {"steps": 3})
    before = generate(wan, "a red fox", arguments).frames
    ran(bench_of(wan, [("first_block_cache", 0.9), ("taylorseer", 2)], [Recipe.load("neutral")], steps=6))
    assert np.array_equal(generate(wan, "a red fox", arguments).frames, before)
    assert not [name for name, each in wan.pipe.transformer.named_modules() if "forward" in vars(each)]


def test_a_bench_that_was_stopped_has_what_it_measured(wan, monkeypatch):
    benching, heard = bench_of(wan, [("steps", 2), ("steps", 3)], prompts=2), Heard()
    real, calls = generate, []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(running, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        benching.run(heard)
    benching.stopped()
    rows = rows_of(benching.result.as_dict())
    assert rows["steps:2"]["runs"] == 1 and rows["steps:2"]["error"] is None
    assert "not reached" in rows["steps:3"]["error"]


def test_a_recipe_of_another_model_is_refused_before_any_generation(wan):
    with pytest.raises(BadUsage, match="asked to bench the recipe toys/pixart/safe"):
        check_recipes(wan, [Recipe.load("neutral"), Recipe.load("toys/pixart/safe")])
    with pytest.raises(Exception, match="not accelerated"):
        api.report(wan.pipe)


def test_a_model_of_an_unknown_family_is_benched_against_fewer_steps(wan):
    stranger = dataclasses.replace(wan, family=None)
    measured = ran(bench_of(stranger, [("steps", 3), ("cache_dit", None)]))
    rows = rows_of(measured)
    assert list(rows) == ["dense", "steps:3"] and rows["steps:3"]["work"] is None
    assert "family" in measured["left_out"]["cache_dit"]


def test_the_op_serves_dense_rivals_and_recipes(wan):
    jobs = [Job("a red fox", 0)]
    asked = Asked([("first_block_cache", 0.9)], [Recipe.from_text(REUSE, name="mine")], jobs, jobs[0], False)
    form = Form("float32", attention="op")
    measured = ran(Benching(wan, call_arguments(wan, {"steps": 10}), form, asked))
    rows = rows_of(measured)
    assert [row["error"] for row in rows.values()] == [None] * 3 and measured["attention"] == "op"
    assert rows["dit_accel:mine"]["counters"].keys() >= {"full_auto", "reuse"}
    assert "full" not in rows["dit_accel:mine"]["counters"]
    assert rows["first_block_cache:0.9"]["work"] < 1
