"""`dit-accel compare`, `demo` and `doctor`."""

import json

import pytest

KEYS = {
    "dense_seconds",
    "recipe_seconds",
    "speedup",
    "psnr",
    "ssim",
    "faithfulness",
    "counters",
    "peak_bytes",
    "versions",
    "device",
}


def test_json_on_stdout_is_alone_there(command, tiny_folder):
    ran = command("compare", "-m", tiny_folder("wan"), "-r", "neutral", "--num-prompts", 1, "--json", "-")
    assert ran.code == 0, ran.said
    result = json.loads(ran.out)
    assert set(result) >= KEYS
    assert result["psnr"] == 100
    assert result["ssim"] == pytest.approx(1)
    assert set(result["faithfulness"]) == {"dense", "recipe"}
    assert result["counters"]["full"] > 0
    assert result["peak_bytes"] > 0
    assert "Speedup" in ran.err


def test_files_are_written_and_the_prompts_of_a_file_are_used(command, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# mine\na red fox\n\na <blue> bird\n")
    numbers, page = tmp_path / "new" / "result.json", tmp_path / "page.html"
    ran = command(
        "compare", "-m", tiny_folder("pixart_sigma"), "-r", "neutral", "--prompts", prompts,
        "--seed", 5, "--rival-steps", 1, "--no-warm-up", "--json", numbers, "--html", page,
    )  # fmt: skip
    assert ran.code == 0, ran.said
    result = json.loads(numbers.read_text())
    assert result["jobs"] == [{"prompt": "a red fox", "seed": 5}, {"prompt": "a <blue> bird", "seed": 6}]
    assert result["columns"]["rival"]["steps"] == 1
    assert result["columns"]["rival"]["psnr"] < 100
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 6
    assert "a &lt;blue&gt; bird" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-r", "none"], "--recipe is none"),
        (["-r", "neutral", "--rival-steps", "few"], 'rival-steps "few"'),
        (["-r", "neutral", "--prompts", "gone.txt"], "gone.txt"),
    ],
)
def test_wrong_usage_is_refused(arguments, words, command, tiny_folder):
    ran = command("compare", "-m", tiny_folder("wan"), *arguments)
    assert ran.code == 2
    assert words in ran.said


def test_demo_writes_a_page_the_videos_and_the_numbers(command, tiny_folder, tmp_path):
    ran = command("demo", "-m", tiny_folder("wan"), "-r", "neutral", "-o", tmp_path / "demo")
    assert ran.code == 0, ran.said
    written = {file.name for file in (tmp_path / "demo").iterdir()}
    assert {"index.html", "dense.mp4", "recipe.mp4", "result.json"} <= written
    assert "index.html in a browser" in ran.said


def test_doctor_names_what_is_missing_and_why(command, monkeypatch):
    import torch

    from dit_accel import doctor

    ran = command("doctor")
    assert torch.__version__ in ran.said
    assert "masked_attention" in ran.said

    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch>=99", 'peft; extra == "peft"', "nothing-like-it"]
    )
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["torch"].fine is False
    assert ">=99 is needed" in found["torch"].said
    assert found["nothing-like-it"].fine is False
    assert "pip install" in found["nothing-like-it"].said
    assert command("doctor").code == 1
