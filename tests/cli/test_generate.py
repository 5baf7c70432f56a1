"""`dit-accel generate`: files of every family, and refusals that say what to do."""

import re

import imageio.v3 as iio
import numpy as np
import pytest

PROMPT = "a cat on a skateboard"


@pytest.mark.parametrize(
    ("name", "file", "shape"),
    [
        ("wan", "out.mp4", (5, 32, 48, 3)),
        ("cogvideox", "out.mp4", (9, 32, 48, 3)),
        ("pixart_sigma", "out.png", (32, 48, 3)),
        ("qwen_image", "out.png", (32, 48, 3)),
    ],
)
def test_every_family_is_written_as_asked(name, file, shape, command, tiny_folder, tmp_path):
    ran = command("generate", "-m", tiny_folder(name), "-p", PROMPT, "-r", "neutral", "-o", tmp_path / file)
    assert ran.code == 0, ran.said
    assert iio.imread(tmp_path / file).shape == shape
    assert "neutral on" in ran.out


def test_a_neutral_recipe_changes_no_pixel_and_a_seed_does(command, tiny_folder, tmp_path):
    def pixels(name: str, *more: str) -> np.ndarray:
        out = tmp_path / name
        assert command("generate", "-m", tiny_folder("wan"), "-p", PROMPT, "-o", out, *more).code == 0
        return iio.imread(out)

    dense = pixels("dense.png", "-r", "none")
    assert dense.shape == (32, 5 * 48, 3)  # a video saved as a picture is a strip
    assert np.array_equal(pixels("neutral.png", "-r", "neutral"), dense)
    assert not np.array_equal(pixels("seed.png", "-r", "none", "--seed", "1"), dense)


def test_options_reach_the_pipeline(command, tiny_folder, tmp_path):
    options = ["--steps", 3, "--height", 48, "--width", 32, "--num-frames", 9, "--guidance", 1.5]
    out = tmp_path / "out.gif"
    ran = command("generate", "-m", tiny_folder("wan"), "-p", PROMPT, "-r", "neutral", "-o", out, *options)
    assert ran.code == 0, ran.said
    assert iio.imread(out).shape == (9, 48, 32, 3)
    assert "3 steps" in ran.out


def test_the_report_is_one_file_that_fetches_nothing(command, tiny_folder, tmp_path):
    page, out = tmp_path / "report.html", tmp_path / "out.mp4"
    ran = command(
        "generate", "-m", tiny_folder("wan"), "-p", "<b>cat", "-r", "neutral", "-o", out, "--report", page
    )
    assert ran.code == 0, ran.said
    text = page.read_text()
    assert "data:video/mp4;base64," in text
    assert "http://" not in text
    assert "https://" not in text
    assert "&lt;b&gt;cat" in text


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("wan", ["-o", "x.avi"], "x.avi.*Change the ending"),
        ("pixart_sigma", ["-o", "x.mp4"], "an image.*x.mp4.*saved as .png"),
        ("pixart_sigma", ["-o", "x.png", "--num-frames", "9"], "--num-frames 9.*takes no num_frames"),
        ("wan", ["-o", "x.mp4", "--height", "33"], "height=33.*refused.*divisible by 16"),
        ("wan", ["-o", "x.mp4", "-r", "netural"], "netural.*nearest: neutral"),
        ("wan", ["-o", "x.mp4", "--dtype", "int3"], "int3.*known: float32"),
        ("wan", ["-o", "x.mp4", "--device", "abacus"], "abacus.*knows no such device"),
        ("wan", ["-o", "x.mp4", "--device", "cuda:97"], "cuda:97.*--device cpu"),
        ("wan", ["-o", "x.mp4", "--steps", "0"], "steps"),
        ("wan", ["-o", "x.mp4", "--strict"], "asked to use a recipe.*none was given"),
        ("wan", ["-o", "x.mp4", "--bogus"], "No such option"),
        ("wan", ["-o", "x.mp4", "--image", "none.png"], "none.png.*cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_with_code_2(name, arguments, words, command, tiny_folder, tmp_path):
    recipe = [] if "-r" in arguments or "--strict" in arguments else ["-r", "neutral"]
    arguments = [str(tmp_path / each) if each.startswith("x.") else each for each in arguments]
    ran = command("generate", "-m", tiny_folder(name), "-p", PROMPT, *recipe, *arguments)
    assert ran.code == 2, ran.said
    assert not list(tmp_path.glob("x.*"))
    assert "Traceback" not in ran.said

    assert re.search(words, ran.said), ran.said


@pytest.mark.parametrize("model", ["./nowhere", "toys/nothing", "one", "a/b/c"])
def test_a_model_that_is_not_there_is_named(model, command, tmp_path):
    ran = command("generate", "-m", model, "-p", PROMPT, "-r", "none", "-o", tmp_path / "x.mp4")
    assert ran.code == 2
    assert model in ran.said


def test_a_hub_id_that_cannot_be_loaded_fails_with_code_1(command, tmp_path):
    ran = command("generate", "-m", "nobody/nothing", "-p", PROMPT, "-r", "none", "-o", tmp_path / "x.mp4")
    assert ran.code == 1
    assert "nobody/nothing" in ran.said
    assert "Traceback" not in ran.said


def test_a_failure_is_a_panel_and_debug_shows_where(command, tiny_folder, tmp_path, monkeypatch, capsys):
    from dit_accel import media

    def broken(*_: object) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(media, "save", broken)
    arguments = ["generate", "-m", tiny_folder("wan"), "-p", PROMPT, "-r", "none", "-o", tmp_path / "x.mp4"]
    ran = command(*arguments)
    assert ran.code == 1
    assert "RuntimeError: the disk is full" in ran.said
    assert "Traceback" not in ran.said
    with pytest.raises(RuntimeError, match="the disk is full"):
        command(*arguments, "--debug")


def test_strict_fails_when_the_recipe_did_nothing(command, tiny_folder, tmp_path):
    recipe = tmp_path / "reuse.toml"
    recipe.write_text(
        'schema = 1\n[made_for]\nsteps = 2\n[choices]\nC = { method = "compute" }\nr = { method = "reuse" }\n'
        '[timeline.both]\n"blocks.0" = "Cr"\n'
    )
    arguments = ["generate", "-m", tiny_folder("wan"), "-p", PROMPT, "-r", recipe, "-o", tmp_path / "x.mp4"]
    assert command(*arguments).code == 0
    ran = command(*arguments, "--strict")
    assert ran.code == 1, ran.said
