"""The front of speed and nearness, and its picture."""

import builtins
from pathlib import Path

import imageio.v3 as iio
import pytest

from dit_accel import results
from dit_accel.bench import pareto
from dit_accel.errors import DitAccelError


def row(name, speedup, psnr):
    return {"name": name, "seconds": 6 / speedup, "speedup": speedup, "psnr": psnr}


ROWS = [
    row("dense", 1.0, 100.0),
    row("steps:10", 2.0, 25.0),
    row("steps:5", 4.0, 20.0),
    row("cache_dit:0.1", 2.0, 30.0),
    row("cache_dit:0.2", 3.0, 19.0),
    row("dit_accel:mine", 2.5, 29.0),
    row("twin", 2.5, 29.0),
    {"name": "pab:2", "error": "IndexError: no"},
    row("cache_dit:0.01", 1.02, 100.0) | {"changed_nothing": True},
]


def test_the_front_is_what_nobody_beats():
    assert pareto.front(ROWS) == {"cache_dit:0.1", "dit_accel:mine", "twin", "steps:5"}
    assert pareto.front([]) == pareto.front(ROWS[:1]) == set()


def test_a_picture_is_drawn_with_a_panel_for_each_title(tmp_path: Path):
    pareto.draw({"one": ROWS}, tmp_path / "one.png")
    pareto.draw({"one": ROWS, "nothing ran": ROWS[:1]}, tmp_path / "two.png")
    one, two = (iio.imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] == 2 * one.shape[0] and one.std() > 0
    assert (tmp_path / "one.png").stat().st_size < 100_000


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch):
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(DitAccelError, match=r"dit_accel\[plot\]"):
        pareto.draw({"one": ROWS}, tmp_path / "one.png")


def test_recorded_benches_become_a_table_and_a_picture(tmp_path: Path):
    measured = {
        "rows": ROWS, "model": "toys/wan", "device": "a CPU", "interleaved": 9, "dtype": "float32",
        "shape": {"height": 64, "width": 64, "steps": 20}, "seeds": [0], "versions": {},
    }  # fmt: skip
    compared = {"what": "pipeline", "device": "a CPU", "model": "toys/wan", "name": "dense", "seconds": 9.0}
    results.append([compared, *results.lines_from(measured)], tmp_path, "cpu")
    lines = results.read(tmp_path)
    assert [file.name for file in pareto.draw_models(lines, tmp_path)] == ["pareto_toys-wan.png"]
    assert (tmp_path / "pareto_toys-wan.png").is_file()
    alone, together = results.tables(lines).split("**toys/wan**")[1:]
    assert "pareto" not in alone and "9.00" in alone
    assert "64 x 64, 20 steps, float32 (all in turn)" in together
    assert "![speed and nearness to dense](docs/results/pareto_toys-wan.png)" in together
    assert "| cache_dit:0.01 (changed nothing) | 5.88" in together
    assert together.index("| pab:2 | failed") < together.index("cache_dit:0.1") < together.index("steps:5")
