"""From a name to a recipe or a model folder, and what is said when there is none."""

from pathlib import Path

import pytest

from dit_accel import recipe_names
from dit_accel.errors import RecipeError
from dit_accel.recipe import Recipe, list_recipes, resolve_model

TEXT = """\
schema = 1
[choices]
F = { method = "full" }
[attention.both]
"blocks.*.attn1" = ["F"]
"""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A shelf of shipped recipes and toys of our own, an empty working folder, and no network."""
    (tmp_path / "recipes" / "toys" / "wan").mkdir(parents=True)
    (tmp_path / "recipes" / "toys" / "wan" / "balanced.toml").write_text(TEXT, encoding="utf-8")
    (tmp_path / "toys" / "wan").mkdir(parents=True)
    (tmp_path / "toys" / "wan" / "model_index.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(recipe_names, "RECIPES", tmp_path / "recipes")
    monkeypatch.setattr(recipe_names, "TOYS", tmp_path / "toys")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def test_a_shipped_name_resolves_from_any_folder(shelf):
    assert list_recipes() == ("neutral", "toys/wan/balanced")
    recipe = Recipe.load("toys/wan/balanced")
    assert recipe == Recipe.from_text(TEXT)
    assert recipe.name == "toys/wan/balanced"
    assert Recipe.load(recipe) is recipe


def test_a_shipped_name_comes_before_a_folder_of_that_name(shelf):
    Recipe.neutral().save("toys/wan/balanced/recipe.toml")
    assert Recipe.load("toys/wan/balanced") == Recipe.from_text(TEXT)
    assert Recipe.load("./toys/wan/balanced") == Recipe.neutral()
    assert Recipe.load(Path("toys/wan/balanced")) == Recipe.neutral()


def test_a_path_is_a_file_or_a_folder_with_one_recipe(shelf):
    Recipe.neutral().save("mine/only.toml")
    assert Recipe.load("mine/only.toml") == Recipe.load("mine") == Recipe.neutral()
    Recipe.from_text(TEXT).save("mine/second.toml")
    with pytest.raises(RecipeError, match=r"several recipes: only\.toml, second\.toml"):
        Recipe.load("mine")
    Recipe.from_text(TEXT).save("mine/recipe.toml")
    assert Recipe.load("mine") == Recipe.from_text(TEXT)


def test_a_name_that_leads_nowhere_says_what_was_tried(shelf, monkeypatch):
    monkeypatch.setattr("dit_accel.recipe.download", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(
        RecipeError, match=r"nearest: toys/wan/balanced.*\(2\) not a \.toml.*\(3\) not a Hub id"
    ):
        Recipe.load("toys/wan/balancd")
    with pytest.raises(RecipeError, match=r"folder of shipped recipes: toys/wan/balanced"):
        Recipe.load("toys/wan")
    with pytest.raises(RecipeError, match=r"a\.toml:1: there is no such file"):
        Recipe.load("toys/a.toml")
    for name in ("../x", "a/../b", "/etc", "", "x", "https://host/x", Path("no/where")):
        with pytest.raises(RecipeError, match=r"no recipe is called.*not a Hub id"):
            Recipe.load(name)


def test_an_unreachable_hub_id_says_what_was_tried(shelf):
    with pytest.raises(
        RecipeError, match=r'called "org/repo".*nearest: .*\(3\) hub:org/repo/recipe\.toml.*fetched'
    ):
        Recipe.load("org/repo")


def test_a_toy_name_resolves_to_its_folder_and_other_models_stay(shelf):
    assert resolve_model("toys/wan") == str(shelf / "toys" / "wan")
    assert resolve_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    for name in ("toys/wam", "toys", "toys/../toys/wan"):
        with pytest.raises(RecipeError, match=r"no toy model is called.*known: toys/wan"):
            resolve_model(name)
