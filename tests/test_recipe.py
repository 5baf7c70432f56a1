"""Recipes: what they hold, what they refuse and with which words, how they are found and saved."""

import hashlib
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from dit_accel import recipe_files, recipe_names
from dit_accel.errors import RecipeError
from dit_accel.recipe import Choice, MadeFor, Recipe, list_recipes, resolve_model
from dit_accel.registry import METHODS, register_method

TEXT = """\
schema = 1
[made_for]                    # what it was searched on
family = "wan"
model  = "toys/wan"
steps  = 6
grid   = [9, 16, 16]
[choices]
F = { method = "full" }
b = { method = "window", radius = [1, 2, 3] }
r = { method = "reuse" }
C = { method = "compute" }
[noise]
edges = [1.0, 0.9, 0.0]
[limits]
memory_gb = 1.5
[attention.both]
"blocks.0.attn1" = [
    "FFFb",
    "Fbbr",
]
"blocks.*.attn1" = ["F", "b"]
[timeline.both]
"blocks.1-6" = "CCCrCC"
[timeline.uncond]
"transformer_2.blocks.3.ffn" = "CCCrCC"
[files]
router.safetensors = "0000000000000000000000000000000000000000000000000000000000000000"
[made_by]
command = 'search "it" \\ é'
seeds = [1, 2]
quality = { psnr = 31.5 }
date = 2026-01-02
"""


@dataclass(frozen=True)
class Probe:
    """A method with a parameter of every kind that a recipe can hold."""

    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    radius: tuple[int, int, int]
    gain: float = 1.0
    max_age: int = 2
    difference: bool = True
    label: str = "x"
    gates: Literal["current", "stored"] = "current"
    levels: tuple[float, ...] = ()
    limit: int | None = None

    def __post_init__(self):
        if self.max_age < 1:
            raise ValueError(f"max_age must be at least 1; got {self.max_age}")


@pytest.fixture
def probe(monkeypatch):
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))
    register_method("probe", Probe)


def read(text: str) -> Recipe:
    return Recipe.from_text(text, source="my.toml")


def refused(old: str, new: str) -> str:
    """The error for TEXT with one change."""
    assert TEXT.count(old) == 1
    with pytest.raises(RecipeError) as error:
        read(TEXT.replace(old, new))
    return str(error.value)


def test_a_recipe_holds_what_its_picture_shows():
    recipe = read(TEXT)
    assert recipe.made_for == MadeFor("wan", "toys/wan", 6, (9, 16, 16))
    assert recipe.choices["b"] == Choice("b", "window", {"radius": (1, 2, 3)})
    assert recipe.edges == (1.0, 0.9, 0.0)
    assert recipe.attention["both"]["blocks.0.attn1"] == ("FFFb", "Fbbr")
    assert recipe.timeline["uncond"] == {"transformer_2.blocks.3.ffn": "CCCrCC"}
    assert recipe.memory_gb == 1.5
    assert recipe.files == {"router.safetensors": "0" * 64}
    assert recipe.made_by["quality"] == {"psnr": 31.5}
    assert recipe.letters() == set("FbrC")


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, dit_accel.recipe as r; r.Recipe.neutral(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_writing_and_reading_again_gives_an_equal_recipe():
    recipe = read(TEXT)
    again = Recipe.from_text(recipe.to_toml())
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()


def test_the_written_picture_is_aligned_beneath_a_ruler():
    row = "C" * 25
    recipe = Recipe.from_dict({
        "schema": 1, "made_for": {"steps": 25}, "choices": {"C": {"method": "compute"}},
        "timeline": {"both": {"blocks.1-6": row, "blocks.10-20": row}},
    })  # fmt: skip
    lines = recipe.to_toml().split("\n")
    at = lines.index("[timeline.both]")
    assert lines[at + 1 : at + 4] == [
        "#                 0         10        20",
        f'"blocks.1-6"   = "{row}"',
        f'"blocks.10-20" = "{row}"',
    ]
    assert lines[at + 1].index("0") == lines[at + 2].index("C")


def test_every_kind_of_text_survives_writing():
    text = 'quote " slash \\ tab \t line \n del \x7f nul \x00 é 🐈'
    recipe = Recipe.from_dict({"schema": 1, "made_by": {"a b": text, "": [True, 1, -0.5, 1e-9], "k": {}}})
    assert Recipe.from_text(recipe.to_toml()).made_by == recipe.made_by


def test_where_finds_the_line_of_every_key():
    recipe = read(TEXT)
    assert recipe.where("attention", "both", "blocks.0.attn1") == "my.toml:17"
    assert recipe.where("attention", "both", "blocks.*.attn1") == "my.toml:21"
    assert recipe.where("choices", "b", "radius") == "my.toml:9"
    assert recipe.where("files", "router.safetensors") == "my.toml:27"
    assert recipe.where("timeline", "both", "blocks.9") == "my.toml:22"  # the table, where the key is not
    assert recipe.where("nothing") == "my.toml:1"
    assert Recipe.neutral().where("choices", "F") == "neutral"


def test_lines_survive_comments_quotes_dots_inline_tables_and_strings_that_look_like_keys():
    recipe = read('''schema = 1  # [timeline.both]
made_for.steps = 2
"made_for"."model" = "#[choices]"
choices = { "C" = { method = "compute" }, 'r' = { method = "reuse",  max_age = 2 } }
[made_by]
note = """
[timeline.both]
"blocks.1" = "CC" """
list = [ "a", # ]
  { "blocks.2" = [ 1 ] } ]
[timeline]
both = { "blocks.\\u0031" = "CC", "blocks.2" = "Cr" }
''')
    assert recipe.where("made_for", "steps") == "my.toml:2"
    assert recipe.where("made_for", "model") == "my.toml:3"
    assert recipe.where("choices", "r", "max_age") == "my.toml:4"
    assert recipe.where("made_by", "list") == "my.toml:9"
    assert recipe.where("timeline", "both", "blocks.1") == "my.toml:12"
    assert recipe.where("timeline", "both", "blocks.2") == "my.toml:12"


BROKEN = [
    ("schema = 1", "schema = 2", "my.toml:1: schema is 2; this version reads schema 1"),
    ("schema = 1", "", "my.toml:1: has no schema"),
    ("[limits]", "[limit]", 'my.toml:14: "limit" is unknown; nearest: limits'),
    ("steps  = 6", "step = 6", 'my.toml:5: [made_for] "step" is unknown; nearest: steps'),
    ("steps  = 6", "steps = true", "my.toml:5: [made_for] steps must be a whole number"),
    ("steps  = 6", "steps = 10001", "my.toml:5: [made_for] steps must be a whole number from 1 to 10000"),
    ("steps  = 6", "", 'my.toml:23: [timeline.both] "blocks.1-6" needs to know the number of steps'),
    ("[9, 16, 16]", "[9, 16]", "my.toml:6: [made_for] grid must be three whole numbers"),
    ("[9, 16, 16]", "[9, 16, 0]", "my.toml:6: [made_for] grid must be three whole numbers"),
    ('"toys/wan"', "3", "my.toml:4: [made_for] model must be text in quotes; found 3"),
    ('"full"', '"ful"', 'my.toml:8: [choices] F: no method is called "ful"; nearest: full'),
    ('F = { method = "full" }', "F = {}", "my.toml:8: [choices] F names no method"),
    ("F = { m", "Fu = { m", 'my.toml:8: [choices] "Fu" is no letter'),
    ("F = { m", '" " = { m', 'my.toml:8: [choices] " " is no letter'),
    ("[1.0, 0.9, 0.0]", "[1.0, 0.9, 0.1]", "my.toml:13: [noise] edges must run from 1.0 to 0.0"),
    ("[1.0, 0.9, 0.0]", "[1.0, 1.0, 0.0]", "my.toml:13: [noise] edges must fall"),
    ("[1.0, 0.9, 0.0]", "[1.0, nan, 0.0]", "my.toml:13: [noise] edges must be a finite number"),
    ("[1.0, 0.9, 0.0]", "[1.0, 0.9, 0.5, 0.0]", "has 2 strings, but [noise] edges makes 3 intervals"),
    ("[1.0, 0.9, 0.0]", "0.9", "my.toml:13: [noise] edges must be a list of numbers; found 0.9"),
    ("memory_gb = 1.5", "memory_gb = 0", "my.toml:15: [limits] memory_gb must be over 0"),
    ("memory_gb = 1.5", "memory_gb = inf", "my.toml:15: [limits] memory_gb must be a finite number"),
    ('"FFFb"', '"FFFz"', 'my.toml:17: [attention.both] "blocks.0.attn1" uses the letter "z"'),
    ('"FFFb"', '"FFF"', "has strings of 3, 4 letters"),
    ('"FFFb"', '""', "Give each one letter per head"),
    ("[attention.both]", "[attention.bth]", "my.toml:16: [attention.bth] is no branch; nearest: both"),
    ("[attention.both]", "[attention]", 'my.toml:17: [attention] blocks.0.attn1 must be a table'),
    ('"blocks.*.attn1"', '"blocks.*"', 'names whole blocks, not an attention'),
    ('"blocks.*.attn1"', '"blocks.?.attn1"', "my.toml:21: [attention.both] 'blocks.?.attn1' is no site"),
    ('"blocks.1-6"', '"blocks.6-1"', "runs backwards. Write the range as 1-6"),
    ('"blocks.1-6"', '"../x"', "my.toml:23: [timeline.both] '../x' is no site"),
    ('"blocks.1-6" = "CCCrCC"', '"blocks.1-6" = "CCCrC"', "has 5 letters, but [made_for] steps is 6"),
    ('"blocks.1-6" = "CCCrCC"', '"blocks.1-6" = ["C"]', "must be text in quotes; found ['C']"),
    ("router.saf", '"../router".saf', "my.toml:27: [files] '../router.safetensors' is not allowed"),
    ("router.saf", '"/router".saf', "is not allowed"),
    ("router.safetensors", '"a/../../b.safetensors"', "is not allowed"),
    ("router.safetensors", "'c:\\b.safetensors'", "is not allowed"),
    ("router.safetensors", '"router.pkl"', "only .safetensors files"),
    ("0" * 64, "0" * 63, "my.toml:27: [files] router.safetensors must give its sha256"),
    ("seeds = [1, 2]", "seeds = [1, nan]", "my.toml:30: [made_by] seeds must be a finite number"),
    ("seeds = [1, 2]", "seeds = [1, 2", "is not valid TOML"),
    ("seeds = [1, 2]", "seeds = 99999999999999999999", "does not fit in 64 bits"),
    ("seeds = [1, 2]", f"seeds = {'9' * 5000}", "my.toml:30: holds a number of over 400 digits"),
    ("seeds = [1, 2]", f"seeds = {'[' * 20}{']' * 20}", "my.toml:30: [made_by] seeds is nested more than 8"),
    ("seeds = [1, 2]", f"seeds = {'[' * 5000}", "nested too deeply"),
    ("seeds = [1, 2]", f"s{'.a' * 5000} = 1", "my.toml:30: is nested too deeply"),
    ("seeds = [1, 2]", f"seeds = '{'x' * 20_000}'", "my.toml:30: the line is 20,010 characters long"),
    ("[made_by]", "[made_by]\n[made_by]", "my.toml:29: is not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[f"{i}" for i in range(len(BROKEN))])
def test_a_broken_recipe_names_file_line_and_what_to_do(old, new, message):
    error = refused(old, new)
    assert message in error
    assert error.startswith("my.toml:")


def test_a_recipe_built_in_code_is_checked_as_well():
    recipe = read(TEXT)
    with pytest.raises(RecipeError, match='uses the letter "z"'):
        replace(recipe, timeline={"both": {"blocks.1-6": "CCCzCC"}})


@pytest.mark.parametrize(
    "data",
    [{1: 2}, {"schema": 1, "made_by": {"x": object()}}, {"schema": 1, "made_by": {"x": "\ud800"}},
     {"schema": True}, {"schema": 1, "choices": ["F"]}, {"schema": 1, "choices": {"F": {"method": None}}}],
    ids=str,
)  # fmt: skip
def test_tables_that_are_no_toml_are_refused(data):
    with pytest.raises(RecipeError, match="<dict>: "):
        Recipe.from_dict(data)


def test_neutral_is_neutral_and_other_recipes_are_not():
    assert Recipe.load("neutral") == Recipe.neutral()
    assert Recipe.neutral().is_neutral()
    assert not read(TEXT).is_neutral()
    exact = {
        "attention": {"both": {"blocks.*.attn1": ("F", "F")}},
        "timeline": {"both": {"blocks.1-6": "CCCCCC"}},
    }
    assert replace(read(TEXT), **exact).is_neutral()


def choices(parameters: str) -> Recipe:
    return read(f'schema = 1\n[choices]\nP = {{ method = "probe", {parameters} }}')


def test_parameters_become_the_fields_of_the_method(probe):
    recipe = choices('radius = [1, 2, 3], gain = 2, levels = [1, 0.5], gates = "stored", limit = 4')
    assert recipe.method("P") == Probe((1, 2, 3), 2.0, levels=(1.0, 0.5), gates="stored", limit=4)
    assert isinstance(recipe.method("P").gain, float)
    assert all(isinstance(level, float) for level in recipe.method("P").levels)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("radius = [1, 2]", r"needs radius to be a list of 3, each a whole number; found \(1, 2\)"),
        ("radius = [1, 2, 3.0]", "needs radius"),
        ("radius = 1", "needs radius"),
        ("radus = [1, 2, 3]", 'has no parameter "radus"; nearest: radius'),
        ("gain = 1.0", "needs the parameter radius"),
        ("radius = [1, 2, 3], gain = true", "needs gain to be a number; found True"),
        ("radius = [1, 2, 3], max_age = 2.5", "needs max_age to be a whole number"),
        ("radius = [1, 2, 3], max_age = 0", "max_age must be at least 1; got 0"),
        ("radius = [1, 2, 3], difference = 1", "needs difference to be true or false"),
        ("radius = [1, 2, 3], label = 1", "needs label to be text in quotes"),
        ('radius = [1, 2, 3], gates = "old"', 'needs gates to be "current" or "stored"'),
        ("radius = [1, 2, 3], levels = ['a']", "needs levels to be a list, each a number"),
        ("radius = [1, 2, 3], limit = 'a'", "needs limit to be a whole number"),
        ("radius = [1, 2, 3], seams = 'a'", 'has no parameter "seams"'),
    ],
)
def test_a_wrong_parameter_names_file_line_and_what_is_needed(probe, parameters, message):
    with pytest.raises(RecipeError, match=r"my\.toml:3: \[choices\] P: probe.*" + message):
        choices(parameters).method("P")


def test_an_undeclared_letter_has_no_method():
    with pytest.raises(RecipeError, match=r'my.toml:7: \[choices\] has no "z"; declared: F b r C'):
        read(TEXT).method("z")


@pytest.fixture
def saved(tmp_path) -> Recipe:
    """A recipe on disk with one file beside it."""
    (tmp_path / "router.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest().upper()
    (tmp_path / "recipe.toml").write_text(TEXT.replace("0" * 64, digest), encoding="utf-8")
    return Recipe.from_file(tmp_path / "recipe.toml")


def test_a_file_is_opened_when_its_sha256_is_right(saved, tmp_path):
    assert saved.open_file("router.safetensors") == tmp_path / "router.safetensors"


def test_a_changed_file_is_refused(saved, tmp_path):
    (tmp_path / "router.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        RecipeError, match=r"recipe\.toml:27: \[files\] router\.safetensors has sha256 .* but the recipe"
    ):
        saved.open_file("router.safetensors")


def test_a_file_that_is_missing_or_not_listed_is_named(saved, tmp_path):
    with pytest.raises(RecipeError, match=r'lists no "rooter"; listed: router\.safetensors'):
        saved.open_file("rooter")
    (tmp_path / "router.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"is not at .*Put the file beside the recipe"):
        saved.open_file("router.safetensors")
    with pytest.raises(RecipeError, match="came from no file"):
        read(TEXT).open_file("router.safetensors")


def test_a_link_out_of_the_folder_is_refused_even_with_the_right_sha256(saved, tmp_path):
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes(b"weights")
    (tmp_path / "router.safetensors").unlink()
    (tmp_path / "router.safetensors").symlink_to(outside)
    with pytest.raises(RecipeError, match="is a link out of the recipe's folder"):
        saved.open_file("router.safetensors")


def test_links_of_the_hub_cache_are_followed(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("recipe.toml", "router.safetensors"):
        (tmp_path / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    recipe = Recipe.from_file(snapshot / "recipe.toml")
    assert recipe.open_file("router.safetensors").read_bytes() == b"weights"


def test_saving_copies_the_files_and_reads_back_equal(saved, tmp_path):
    target = saved.save(tmp_path / "new" / "folder" / "other.toml")
    again = Recipe.from_file(target)
    assert again == saved
    assert again.open_file("router.safetensors").parent == target.parent
    assert [path.suffix for path in sorted(target.parent.iterdir())] == [".toml", ".safetensors"]
    assert again.save(target) == target


def test_hostile_files_are_refused_by_name(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"schema = 1\n\xff\xfe")
    with pytest.raises(RecipeError, match=r"recipe\.toml:2: is not UTF-8"):
        Recipe.from_file(path)
    path.write_bytes(b"#\n" * 2_000_001)
    with pytest.raises(RecipeError, match=r"recipe\.toml:1: is over 4,000,000 bytes"):
        Recipe.from_file(path)
    with pytest.raises(RecipeError, match=r"missing\.toml:1: there is no such file"):
        Recipe.from_file(tmp_path / "missing.toml")
    with pytest.raises(RecipeError, match="no regular file"):
        Recipe.from_file(tmp_path)


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
    assert recipe == read(TEXT)
    assert recipe.name == "toys/wan/balanced"
    assert Recipe.load(recipe) is recipe


def test_a_shipped_name_comes_before_a_folder_of_that_name(shelf):
    Recipe.neutral().save("toys/wan/balanced/recipe.toml")
    assert Recipe.load("toys/wan/balanced") == read(TEXT)
    assert Recipe.load("./toys/wan/balanced") == Recipe.neutral()
    assert Recipe.load(Path("toys/wan/balanced")) == Recipe.neutral()


def test_a_path_is_a_file_or_a_folder_with_one_recipe(shelf):
    Recipe.neutral().save("mine/only.toml")
    assert Recipe.load("mine/only.toml") == Recipe.load("mine") == Recipe.neutral()
    read(TEXT.replace("router", "#")).save("mine/second.toml")
    with pytest.raises(RecipeError, match=r"several recipes: only\.toml, second\.toml"):
        Recipe.load("mine")
    read(TEXT.replace("router", "#")).save("mine/recipe.toml")
    assert Recipe.load("mine") == read(TEXT.replace("router", "#"))


def test_a_name_that_leads_nowhere_says_what_was_tried(shelf, monkeypatch):
    monkeypatch.setattr(recipe_files, "download", pytest.fail)
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


def test_a_hub_recipe_comes_with_its_files_from_one_commit(saved, tmp_path, monkeypatch):
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit / "sub"
    saved.save(snapshot / "fast.toml")
    asked = []

    def hf_hub_download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return str(snapshot.parent / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    recipe = Recipe.load("org/repo/sub/fast")
    assert recipe == saved
    assert recipe.name == "org/repo/sub/fast"
    assert asked == [("org/repo", "sub/fast.toml", None), ("org/repo", "sub/router.safetensors", commit)]
    (snapshot / "router.safetensors").write_bytes(b"changed")
    with pytest.raises(RecipeError, match=r"^hub:org/repo/sub/fast\.toml:\d+: .*sha256"):
        Recipe.from_hub("org/repo", "sub/fast.toml")


def test_a_toy_name_resolves_to_its_folder_and_other_models_stay(shelf):
    assert resolve_model("toys/wan") == str(shelf / "toys" / "wan")
    assert resolve_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") == "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    for name in ("toys/wam", "toys", "toys/../toys/wan"):
        with pytest.raises(RecipeError, match=r"no toy model is called.*known: toys/wan"):
            resolve_model(name)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid(name):
    recipe = Recipe.load(name)
    assert Recipe.from_text(recipe.to_toml()) == recipe


def test_the_example_of_the_format_page_is_a_valid_recipe():
    page = (Path(__file__).parent.parent / "recipes" / "README.md").read_text(encoding="utf-8")
    recipe = Recipe.from_text(page.split("```toml\n")[1].split("```")[0])
    assert recipe.edges == (1.0, 0.8, 0.4, 0.0)
    assert Recipe.from_text(recipe.to_toml()) == recipe
