"""Results: lines from measured objects, tables from lines, and a README that says what the lines say."""

from pathlib import Path
from typing import Any

import pytest

from dit_accel import results
from dit_accel.errors import DitAccelError
from dit_accel.recipe import Recipe

ROOT = Path(__file__).parent.parent


def column(steps: int, seconds: float, psnr: float) -> dict[str, Any]:
    return {
        "steps": steps,
        "seconds": seconds,
        "speedup": 6.0 / seconds,
        "psnr": psnr,
        "ssim": 0.97,
        "faithfulness": None,
        "peak_bytes": 3 * 2**29,
    }


COMPARED: dict[str, Any] = {
    "model": "toys/wan",
    "recipe": "toys/wan/balanced",
    "arguments": {
        "height": 128,
        "width": 64,
        "num_frames": 17,
        "num_inference_steps": 30,
        "guidance_scale": 5.0,
    },
    "jobs": [{"prompt": "a", "seed": 3}, {"prompt": "b", "seed": 1}],
    "columns": {
        "dense": column(30, 6.0, 100.0),
        "recipe": column(30, 3.0, 31.25),
        "rival": column(15, 3.1, 27.0),
    },
    "counters": {"full": 10, "reuse": 20},
    "versions": {"torch": "2.13.0"},
    "device": "a CPU, 2 threads",
}


def test_a_comparison_becomes_a_line_for_each_column():
    lines = results.lines_from(COMPARED, commit="abc1234", date="2026-11-22")
    assert [line["name"] for line in lines] == ["dense", "dit_accel:toys/wan/balanced", "steps:15"]
    assert all(
        line["commit"] == "abc1234" and line["seeds"] == [1, 3] and line["runs"] == 2 for line in lines
    )
    assert lines[1]["counters"] == {"full": 10, "reuse": 20}
    assert lines[1]["shape"] == {"height": 128, "width": 64, "frames": 17, "steps": 30}
    assert "faithfulness" not in lines[0]


def test_lines_come_back_as_a_table_with_speed_and_quality_in_a_row(tmp_path: Path):
    searched = COMPARED | {"attention_kept": 0.604, "search_minutes": 7.49}
    results.append(results.lines_from(searched, commit="abc1234"), tmp_path, "cpu")
    table = results.tables(results.read(tmp_path))
    assert (
        "**toys/wan** on a CPU, 2 threads: 64 x 128, 17 frames, 30 steps (medians of 2 runs, commit abc1234)"
        in table
    )
    assert "| dense | 6.00 |  | 1.00 |  |  |  | 1.50 |  |  |" in table
    assert (
        "| dit_accel:toys/wan/balanced | 3.00 | 6.00 | 2.00 | 31.2 | 0.970 |  | 1.50 | 0.60 | 7.5 |" in table
    )


def test_the_newest_line_of_a_name_counts(tmp_path: Path):
    results.append(results.lines_from(COMPARED), tmp_path, "cpu")
    faster = COMPARED | {"columns": {"recipe": column(30, 2.0, 30.0)}}
    results.append(results.lines_from(faster), tmp_path, "cpu")
    table = results.tables(results.read(tmp_path))
    assert table.count("toys/wan/balanced") == 1
    assert "| 2.00 | 6.00 | 3.00 |" in table


def test_a_row_that_failed_says_so():
    rows = {"rows": [{"name": "cache-dit", "error": "no such block"}], "model": "toys/wan", "device": "a CPU"}
    assert "| cache-dit | failed |" in results.tables(results.lines_from(rows))


def test_an_object_of_something_else_is_refused():
    with pytest.raises(DitAccelError, match=r"keys seconds.*Give what `dit-accel compare --json`"):
        results.lines_from({"seconds": 1})


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "cpu.jsonl").write_text('{"what": "op"}\n{\n')
    with pytest.raises(DitAccelError, match=r"cpu\.jsonl:2: not a JSON object"):
        results.read(tmp_path)


def test_a_text_without_markers_is_refused():
    with pytest.raises(DitAccelError, match="results:begin"):
        results.place("# readme", "table")


def test_the_readme_says_what_the_lines_say():
    text = (ROOT / "README.md").read_text()
    assert text == results.place(text, results.tables(results.read(ROOT / "docs" / "results"))), (
        "run python scripts/results_table.py"
    )


def test_the_recipe_in_the_readme_is_a_recipe():
    text = (ROOT / "README.md").read_text().partition("```toml\n")[2].partition("```")[0]
    recipe = Recipe.from_text(text, "README")
    assert {type(recipe.method(letter)).__name__ for letter in recipe.letters()} == {
        "Full",
        "Reuse",
        "Compute",
    }
