"""`dit-accel recipes` and what starts without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """schema = 1
[choices]
w = { method = "window", radius = [1, 1, 1] }
[attention.both]
"blocks.*.attn1" = ["w"]
"""


def test_list_names_every_recipe(command):
    from dit_accel.recipe import list_recipes

    ran = command("recipes", "list")
    assert ran.code == 0
    assert all(name in ran.out for name in list_recipes())


def test_show_prints_what_can_be_saved_and_checked(command, tmp_path):
    file = tmp_path / "shown.toml"
    file.write_text(command("recipes", "show", "neutral").out)
    ran = command("recipes", "check", file)
    assert ran.code == 0, ran.said
    assert "ok" in ran.out


def test_show_of_an_unknown_name_is_refused(command):
    ran = command("recipes", "show", "toys/wan/balnced")
    assert ran.code == 2
    assert "balnced" in ran.said


def test_check_accepts_all_that_is_shipped(command):
    ran = command("recipes", "check")
    assert ran.code == 0, ran.said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("window", "windw", "my.toml:3.*windw.*window"),
        ("radius", "raduis", "my.toml:3.*raduis.*radius"),
        ('["w"]', '["x"]', "my.toml:5"),
        ("schema = 1", "schema = 1 1", "my.toml:1"),
    ],
)
def test_check_points_at_the_line(old, new, words, command, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)  # a long path would be broken over two lines of the panel
    Path("my.toml").write_text(GOOD.replace(old, new))
    ran = command("recipes", "check", "my.toml")
    assert ran.code == 1
    assert re.search(words, ran.said), ran.said
    assert "Traceback" not in ran.said


def test_check_of_a_missing_file_is_wrong_usage(command, tmp_path):
    assert command("recipes", "check", tmp_path / "gone.toml").code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["recipes", "list"]], ids=" ".join)
def test_help_and_list_import_no_torch(arguments):
    program = (
        "import sys; from dit_accel.cli import main; sys.argv[1:] = sys.argv[1:]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_has_an_example_in_its_help(command):
    for name in (["generate"], ["compare"], ["demo"], ["doctor"], ["recipes", "list"], ["recipes", "show"]):
        ran = command(*name, "--help")
        assert ran.code == 0
        assert "dit-accel" in ran.out.split("Usage", 1)[1].split("\n", 1)[1], name
