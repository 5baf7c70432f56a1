"""`dit-accel search`."""

import pytest

from dit_accel.recipe import Recipe


def test_a_recipe_its_state_and_its_page_are_written(command, tiny_folder, tmp_path):
    words = ("search", "-m", tiny_folder("pixart_sigma"), "--method", "ditfastattn", "--delta", 1.0)
    words += ("--steps", 9, "--num-prompts", 1, "--held-out", 1, "--out", tmp_path)
    ran = command(*words)
    assert ran.code == 0, ran.said
    file = tmp_path / tiny_folder("pixart_sigma").name / "ditfastattn.toml"
    recipe = Recipe.from_file(file)
    made_by = recipe.made_by
    assert recipe.timeline["both"]["transformer_blocks.0.attn1"] == "C" + "r" * 8
    assert made_by["delta"] == 1.0 and made_by["psnr"] > 0 and made_by["measured"] is True
    assert len(made_by["calibration"]) == len(made_by["held_out"]) == 1
    assert str(tmp_path) not in made_by["command"] and "--delta 1.0" in made_by["command"]
    page = file.with_suffix(".html").read_text()
    assert page.count(": near 0.") == 2 * 3 * 2  # alt and caption of a strip for each layer and step
    assert "transformer_blocks.1.attn1, step 4: R; tried R" in page
    assert file.with_suffix(".state.json").is_file()
    again = command(*words)
    assert again.code == 0, again.said
    assert Recipe.from_file(file).timeline == recipe.timeline
    other = command(*words, "--seed", 7)
    assert other.code == 2 and "is the state of a search with prompts" in other.said


def test_a_recipe_by_head_is_written_and_searched_once(command, tiny_folder, tmp_path):
    words = ("search", "-m", tiny_folder("wan"), "--method", "ditfastattn_v2", "--delta", 0.02)
    words += ("--steps", 9, "--num-prompts", 1, "--held-out", 1, "--out", tmp_path, "--full", "auto")
    ran = command(*words, "--error", "head")
    assert ran.code == 0, ran.said
    file = tmp_path / "wan" / "ditfastattn_v2.toml"
    recipe = Recipe.from_file(file)
    assert recipe.choices["F"].parameters == {"backend": "auto"}
    assert {len(text) for rows in recipe.attention.values() for row in rows.values() for text in row} == {4}
    settings = {name: recipe.made_by[name] for name in ("menu", "error", "interval", "full", "delta")}
    assert settings == {"menu": "v2", "error": "head", "interval": 1, "full": "auto", "delta": 0.02}
    page = file.with_suffix(".html").read_text()
    assert "blocks.1.attn1, head 3, step 4: " in page and "; tried r " in page
    assert page.count(": near ") == 2 * 3 * 2
    state = file.with_suffix(".state.json").read_text()
    again = command(*words, "--error", "head")
    assert again.code == 0, again.said
    assert file.with_suffix(".state.json").read_text() == state
    other = command(*words, "--error", "projected")
    assert other.code == 2 and "is the state of a search with error head" in other.said


def test_a_goal_by_head_begins_where_the_method_says(command, tiny_folder, tmp_path):
    ran = command(
        "search", "-m", tiny_folder("wan"), "--method", "ditfastattn_v2", "--psnr", 20, "--minutes", 5,
        "--steps", 9, "--num-prompts", 1, "--held-out", 1, "--out", tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.said
    assert "delta 0.003: " in ran.said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "guess"], 'search by "guess"; known: '),
        (["--method", "ditfastattn"], "found none of them"),
        (
            ["--method", "ditfastattn", "--delta", "0.1", "--speedup", "2"],
            "found --delta 0.1 and --speedup 2.0",
        ),
        (["--method", "ditfastattn", "--delta", "0.1", "--minutes", "0"], "within 0 minutes"),
        (["--method", "ditfastattn", "--delta", "0.1", "--memory-gb", "-1"], "keep -1 gigabytes"),
        (["--method", "ditfastattn", "--delta", "0.1", "--sites", "blocks.0.ffn"], "no self-attention"),
        (["--method", "ditfastattn", "--speedup", "2", "--steps", "2"], "the first of 2 steps"),
        (["--method", "timeline", "--delta", "0.1"], "--delta with --method timeline"),
        (["--method", "timeline", "--minutes", "3"], "--minutes with --method timeline"),
        (["--method", "timeline", "--full", "auto"], "--full with --method timeline; it takes --speedup."),
        (["--method", "ditfastattn", "--menu", "v2"], "--menu with --method ditfastattn; it takes --delta"),
        (["--method", "ditfastattn_v2", "--near", "band"], "or use --method ditfastattn."),
        (["--method", "ditfastattn_v2"], "--delta 0.003 is a first try"),
        (["--method", "ditfastattn_v2", "--delta", "0.1", "--interval", "0"], "a decision every 0 steps"),
        (["--method", "ditfastattn_v2", "--delta", "0.1", "--menu", "all"], 'menu "all"; known: v2, ours'),
        (["--method", "timeline", "--name", "mine"], 'asked for the name "mine"'),
        (["--method", "ditfastattn", "--delta", "0.1", "--prompts", "gone.txt"], "gone.txt"),
    ],
)
def test_wrong_usage_is_refused(options, words, command, tiny_folder, tmp_path):
    ran = command("search", "-m", tiny_folder("wan"), "--out", tmp_path / "out", *options)
    assert ran.code == 2
    assert words in ran.said
    assert not list((tmp_path / "out").rglob("*.toml"))


def test_prompts_of_a_file_are_split(command, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\na bird\n")
    words = (
        "search",
        "-m",
        tiny_folder("wan"),
        "--method",
        "ditfastattn",
        "--delta",
        1.0,
        "--prompts",
        prompts,
    )
    ran = command(*words, "--num-prompts", 2, "--out", tmp_path)
    assert ran.code == 2 and "it has 2. Give more" in ran.said
    ran = command(*words, "--num-prompts", 1, "--steps", 9, "--out", tmp_path)
    assert ran.code == 0, ran.said
    made_by = Recipe.from_file(tmp_path / "wan" / "ditfastattn.toml").made_by
    assert made_by["calibration"] == ("1000: a fox",) and made_by["held_out"] == ("1001: a bird",)


def test_the_timeline_search_is_a_method_too(command, tiny_folder, tmp_path):
    ran = command(
        "search", "-m", tiny_folder("wan"), "--method", "timeline", "--speedup", 1.05, "--steps", 9,
        "--num-prompts", 1, "--held-out", 1, "--out", tmp_path, "--results", tmp_path / "results",
    )  # fmt: skip
    assert ran.code == 0, ran.said
    recipe = Recipe.from_file(tmp_path / "wan" / "timeline-1.05x.toml")
    assert recipe.timeline["cond"]["blocks.0-1"].startswith("C")
    assert (tmp_path / "results" / "cpu.jsonl").read_text().count("\n") >= 2
