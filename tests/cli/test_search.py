"""`dit-accel search`."""

import pytest

from dit_accel.recipe import Recipe
from dit_accel.search.pursuit import Clock


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
    rows = recipe.attention["cond"] | recipe.attention.get("both", {})
    assert {len(text) for site, row in rows.items() for text in row if "attn1" in site} == {4}
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


def test_a_plan_is_written_and_measured_once(command, tiny_folder, tmp_path):
    words = ("search", "-m", tiny_folder("wan"), "--method", "plan", "--speedup", 1.2, "--minutes", 5)
    words += ("--steps", 9, "--num-prompts", 1, "--held-out", 1, "--out", tmp_path)
    ran = command(*words)
    assert ran.code == 0, ran.said
    assert "plan 1: " in ran.said and "(predicted " in ran.said
    file = tmp_path / "wan" / "plan.toml"
    recipe = Recipe.from_file(file)
    assert recipe.made_by["method"] == "plan" and recipe.made_by["goal"] == "speedup 1.2"
    assert recipe.made_by["psnr"] > 0 and len(recipe.made_by["held_out"]) == 1
    page = file.with_suffix(".html").read_text()
    assert "blocks.1.attn1, head 3, step 4: " in page and "<th>foretold</th>" in page
    assert page.count(": near ") == 2 * 3 * 2
    state = file.with_suffix(".state.safetensors").read_bytes()
    again = command(*words)
    assert again.code == 0, again.said
    assert file.with_suffix(".state.safetensors").read_bytes() == state
    other = command(*words, "--seed", 7)
    assert other.code == 2 and "is the state of a search with prompts" in other.said


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
        (
            ["--method", "ditfastattn_v2", "--delta", "0.1", "--menu", "all"],
            'menu "all"; known: v2, ours, plain',
        ),
        (["--method", "timeline", "--name", "mine"], 'asked for the name "mine"'),
        (
            ["--method", "timeline", "--tau", "0.5"],
            "--tau with --method timeline; it takes --speedup",
        ),
        (["--method", "plan"], "--delta 0.001 is a first try"),
        (["--method", "plan", "--speedup", "1.5", "--full", "auto"], "--full with --method plan; it takes"),
        (["--method", "vorta", "--tau", "0.3"], "--tau 0.3; the greatest of 3 scores"),
        (["--method", "vorta", "--tau", "0.5", "--psnr", "30"], "by VORTA for --psnr 30 and --tau 0.5"),
        (["--method", "vorta", "--speedup", "1"], "--speedup 1; it must be over 1"),
        (["--method", "vorta", "--delta", "0.1"], "--delta with --method vorta"),
        (["--method", "harmonica", "--psnr", "30"], "--psnr with --method harmonica"),
        (["--method", "harmonica", "--gates", "hard"], "no --speedup was given"),
        (["--method", "harmonica", "--proxy", "guess"], 'the proxy "guess"; known: code, paper'),
        (["--method", "harmonica", "--weights", "gone.safetensors"], "there is no such file"),
        (["--method", "vorta", "--beta", "0.1"], "or use --method harmonica."),
        (["--method", "vorta", "--near", "brick"], "--near with --method vorta"),
        (["--method", "vorta", "--sites", "blocks.0.attn1"], "--sites with --method vorta"),
        (["--method", "vorta", "--price", "gold"], 'the price "gold"; known: published, latency'),
        (["--method", "vorta", "--coreset", "all"], 'the coreset "all"; known: published, keys'),
        (["--method", "vorta", "--full", "mine"], 'full heads by "mine"; known: model, auto'),
        (["--method", "vorta", "--temperature", "0"], "temperature 0; it must be over 0"),
        (["--method", "vorta", "--weights", "gone.safetensors"], "there is no such file"),
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


VORTA = ("--method", "vorta", "--steps-of-training", 2, "--micro-batches", 1, "--steps", 3, "--held-out", 1)


def test_routers_are_trained_compiled_and_used_again(command, tiny_folder, tmp_path):
    words = ("search", "-m", tiny_folder("pixart_sigma"), *VORTA, "--num-prompts", 1, "--out", tmp_path)
    words += ("--full", "auto")
    ran = command(*words, "--psnr", 1)
    assert ran.code == 0, ran.said
    assert "seconds of the branches, as shares of full: coreset" in ran.said and "tau none: " in ran.said
    file = tmp_path / tiny_folder("pixart_sigma").name / "vorta.toml"
    recipe, routers = Recipe.from_file(file), file.with_suffix(".training") / "routers.safetensors"
    made_by = recipe.made_by
    assert recipe.choices["F"].parameters["backend"] == "auto"
    across = {f"transformer_blocks.{i}.attn2" for i in range(2)}
    assert set(recipe.attention["both"]) == {f"transformer_blocks.{i}.attn1" for i in range(2)} | across
    assert {letter for site in across for letter in recipe.attention["both"][site]} == {"F"}
    assert made_by["method"] == "vorta" and made_by["trained_steps"] == 2 and made_by["psnr"] > 0
    assert made_by["share_F"] + made_by["share_c"] + made_by["share_t"] == pytest.approx(1, abs=0.01)
    page = file.with_suffix(".html").read_text()
    heads = len(recipe.attention["both"]["transformer_blocks.0.attn1"][0])
    assert page.count("transformer_blocks.1.attn1, head 0, step ") == 3 and "losses over the steps" in page
    assert page.count("<title>transformer_blocks.0.attn1, head ") == 3 * heads
    again = command(
        "search",
        "-m",
        tiny_folder("pixart_sigma"),
        "--method",
        "vorta",
        "--full",
        "auto",
        "--weights",
        routers,
        "--steps",
        3,
        "--held-out",
        1,
        "--num-prompts",
        1,
        "--out",
        tmp_path,
        "--name",
        "again",
    )
    assert again.code == 0, again.said
    given = Recipe.from_file(file.with_name("again.toml"))
    assert given.attention == recipe.attention and given.made_by["routers"] == "given"
    assert not file.with_name("again.training").exists()
    other = command(*words, "--price", "latency")
    assert other.code == 2 and "is of a training with price published" in other.said


def test_a_training_whose_budget_ends_is_used_and_goes_on(command, tiny_folder, tmp_path, monkeypatch):
    words = (
        "search",
        "-m",
        tiny_folder("wan"),
        "--method",
        "vorta",
        "--steps-of-training",
        100,
        "--minutes",
        60,
    )
    words += (*VORTA[4:], "--num-prompts", 1, "--out", tmp_path)
    for steps in (3, 6):
        asked = iter([False] * 3)  # before the training, and after two of its steps
        monkeypatch.setattr(Clock, "ended", lambda _, asked=asked: next(asked, True))
        ran = command(*words)
        assert ran.code == 0, ran.said
        assert f"after step {steps} of 100 of the training; the routers are those of that step" in ran.said
        made_by = Recipe.from_file(tmp_path / tiny_folder("wan").name / "vorta.toml").made_by
        assert made_by["trained_steps"] == steps and "the budget ended after step" in made_by["stopped"]
    monkeypatch.setattr(Clock, "ended", lambda _: True)
    ran = command(*words)
    assert ran.code == 2 and "which goes on from here, or a smaller --held-out" in ran.said


def test_a_router_of_sublayers_is_trained_compiled_and_used_again(command, tiny_folder, tmp_path):
    words = ("search", "-m", tiny_folder("wan"), "--method", "harmonica", "--steps", 9, "--held-out", 1)
    words += ("--num-prompts", 1, "--out", tmp_path)
    ran = command(*words, "--gates", "hard", "--speedup", 1.02, "--steps-of-training", 2)
    assert ran.code == 0, ran.said
    file = tmp_path / tiny_folder("wan").name / "harmonica.toml"
    recipe = Recipe.from_file(file)
    assert recipe.made_by["method"] == "harmonica" and recipe.made_by["trained_steps"] == 2
    assert {letter for row in recipe.timeline["both"].values() for letter in row} <= set("CrP")
    page = file.with_suffix(".html").read_text()
    assert page.count("<title>blocks.0.ffn, step ") == 9 and "losses over the steps" in page
    router = file.with_suffix(".training") / "router.safetensors"
    tau = recipe.made_by["tau"]
    again = command(*words, "--gates", "hard", "--weights", router, "--tau", tau, "--name", "again")
    assert again.code == 0, again.said
    given = Recipe.from_file(file.with_name("again.toml"))
    assert given.timeline == recipe.timeline and given.made_by["router"] == "given"
    other = command(*words, "--gates", "hard", "--speedup", 1.03)
    assert other.code == 2 and "is of a training with speedup 1.02" in other.said
