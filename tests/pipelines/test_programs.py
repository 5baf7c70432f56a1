"""The programs for real checkpoints run on tiny ones of the same classes."""

import runpy
from pathlib import Path

import imageio.v3 as iio
import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"
SIZE = ["--height", "32", "--width", "48", "--steps", "2"]


@pytest.mark.parametrize(
    ("program", "model", "more", "shape"),
    [
        ("wan", "wan", ["--num-frames", "5", "--out", "x.mp4"], (5, 32, 48, 3)),
        ("cogvideox", "cogvideox", ["--num-frames", "9", "--out", "x.mp4"], (9, 32, 48, 3)),
        ("pixart", "pixart_sigma", ["--exact-size", "--out", "x.png"], (32, 48, 3)),
        ("qwen_image", "qwen_image", ["--out", "x.png"], (32, 48, 3)),
    ],
)
def test_a_program_generates(program, model, more, shape, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(tiny_folder(model)), "--recipe", "neutral", "--device", "cpu", *SIZE, *more]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    runpy.run_path(str(PIPELINES / f"{program}.py"), run_name="__main__")
    assert "neutral on" in capsys.readouterr().out
    pixels = iio.imread(tmp_path / more[-1])
    assert pixels.shape[-1] == 3
    # diffusers' export rounds a video's sides up to 16
    assert pixels.shape == shape


@pytest.mark.parametrize("program", sorted(path.name for path in PIPELINES.glob("*.py")))
def test_a_program_is_short(program):
    assert len((PIPELINES / program).read_text().splitlines()) < 60
