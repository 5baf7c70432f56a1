"""`dit-accel bench`."""

import json

import pytest

from dit_accel.bench.running import Benching

FORM = ("--dtype", "float32", "--steps", 4)


def test_json_on_stdout_is_alone_there(command, tiny_folder):
    ran = command(
        "bench", "-m", tiny_folder("wan"), "-r", "neutral", "--num-prompts", 1, "--json", "-", *FORM,
        "--against", "steps:2,first_block_cache:0.9,mag_cache:0.2,pab",
    )  # fmt: skip
    assert ran.code == 0, ran.said
    result = json.loads(ran.out)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "steps:2", "first_block_cache:0.9", "mag_cache:0.2", "dit_accel:neutral"]
    keys = {"name", "seconds", "speedup", "psnr", "ssim", "faithfulness", "peak_bytes", "error"}
    assert all(set(row) >= keys for row in rows.values())
    assert {"model", "versions", "device", "shape", "seeds", "runs"} <= set(result)
    assert "left out: pab" in ran.err and "first_block_cache:0.9" in ran.err
    assert "dit_accel:neutral: changed nothing" in ran.err


def test_files_picture_and_lines_are_written(command, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox\na blue bird\n")
    numbers, picture = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    ran = command(
        "bench", "-m", tiny_folder("pixart_sigma"), "-r", "none", "--prompts", prompts, "--seed", 5, *FORM,
        "--against", "steps", "--no-warm-up", "--json", numbers, "--plot", picture,
        "--results", tmp_path / "results", "--results-name", "here",
    )  # fmt: skip
    assert ran.code == 0, ran.said
    result = json.loads(numbers.read_text())
    assert result["prompts"] == ["a red fox", "a blue bird"] and result["seeds"] == [5, 6]
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "results" / "here.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["dense", "steps:3", "steps:2", "steps:1"]
    assert all({"commit", "date", "shape", "dtype", "interleaved"} <= set(line) for line in lines)
    assert "None" not in ran.out


def test_a_bench_that_is_stopped_writes_what_it_has(command, tiny_folder, tmp_path, monkeypatch):
    def stopped(self, watch):
        self._prompt = None
        raise KeyboardInterrupt

    monkeypatch.setattr(Benching, "run", stopped)
    numbers = tmp_path / "bench.json"
    ran = command(
        "bench", "-m", tiny_folder("wan"), "-r", "none", "--against", "steps:2", "--json", numbers,
        "--results", tmp_path / "results", *FORM,
    )  # fmt: skip
    assert ran.code == 130
    assert all("not reached" in row["error"] for row in json.loads(numbers.read_text())["rows"])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--against", "teacache"], 'against "teacache"'),
        (["--recipe", "toys/wan/balansed"], "toys/wan/balansed"),
        (["--recipe", "neutral", "--recipe", "neutral"], "more than once"),
        (["--dense", "quick"], "--dense quick"),
        (["--plot", "bench.jpg"], "ending to .png"),
        (["--recipe", "toys/pixart/safe"], "toys/pixart/safe"),
    ],
)
def test_wrong_usage_is_refused_before_any_generation(arguments, words, command, tiny_folder, monkeypatch):
    from dit_accel.bench import form, running

    def never(*_, **__):
        raise AssertionError("generated")

    monkeypatch.setattr(form, "generate", never)
    monkeypatch.setattr(running, "generate", never)
    ran = command("bench", "-m", tiny_folder("wan"), *arguments)
    assert ran.code == 2, ran.said
    assert words in ran.said
