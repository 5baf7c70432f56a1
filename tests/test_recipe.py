"""Recipes: what they hold, what they refuse and with which words, how they are found and saved."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dit_accel.errors import RecipeError
from dit_accel.recipe import Choice, ExactTables, MadeFor, Recipe, list_recipes

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
[attention]
both = { "blocks.0.attn1" = [
  "C" ], "blocks.1.attn1" = ["r"] }
[limits]
"memory\\u005fgb" = 1
''')
    assert recipe.where("made_for", "steps") == "my.toml:2"
    assert recipe.where("made_for", "model") == "my.toml:3"
    assert recipe.where("choices", "r", "max_age") == "my.toml:4"
    assert recipe.where("made_by", "list") == "my.toml:9"
    assert recipe.where("timeline", "both", "blocks.1") == "my.toml:12"
    assert recipe.where("timeline", "both", "blocks.2") == "my.toml:12"
    assert recipe.where("attention", "both", "blocks.1.attn1") == "my.toml:15"
    assert recipe.where("limits", "memory_gb") == "my.toml:17"


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
    ids=["key", "object", "surrogate", "schema", "list", "none"],
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


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_is_valid(name):
    recipe = Recipe.load(name)
    assert Recipe.from_text(recipe.to_toml()) == recipe


def test_the_example_of_the_format_page_is_a_valid_recipe():
    page = (Path(__file__).parent.parent / "recipes" / "README.md").read_text(encoding="utf-8")
    recipe = Recipe.from_text(page.split("```toml\n")[1].split("```")[0])
    assert recipe.edges == (1.0, 0.8, 0.4, 0.0)
    assert Recipe.from_text(recipe.to_toml()) == recipe


def test_exact_tables_are_asked_for_and_written_again():
    plain, asked = Recipe.from_text("schema = 1"), Recipe.from_text("schema = 1\n[exact]\ntext_kv = false")
    assert plain.exact == ExactTables("auto", "auto") and asked.exact == ExactTables("auto", False)
    assert "[exact]" not in plain.to_toml()
    assert Recipe.from_text(asked.to_toml()) == asked


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('modulation = "yes"', r'\[exact\] modulation must be "auto", true or false; found \'yes\''),
        ("text_kv = 1", r'\[exact\] text_kv must be "auto", true or false; found 1'),
        ("table = true", r'\[exact\] "table" is unknown; nearest: '),
    ],
)
def test_a_wrong_wish_for_exact_tables_is_told_by_its_line(line, words):
    with pytest.raises(RecipeError, match=rf"my\.toml:3: {words}"):
        read(f"schema = 1\n[exact]\n{line}\n")


def test_an_undeclared_letter_has_no_method():
    with pytest.raises(RecipeError, match=r'my.toml:7: \[choices\] has no "z"; declared: F b r C'):
        read(TEXT).method("z")


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


WEIGHTED = """schema = 1
[made_for]
steps = 4
[choices]
C = { method = "compute" }
L = { method = "fitted" }
[timeline.uncond]
denoiser = "CCLC"
[weights]
levels = [1.0, 0.8, 0.5, 0.2]
[weights.uncond.denoiser]
2 = { c2 = 0.75, u1 = 0.5, x0 = -1e-3 }
"""


def test_weights_are_read_and_written_by_name():
    recipe = Recipe.from_text(WEIGHTED)
    assert recipe.weights == {"uncond": {"denoiser": {2: {"c2": 0.75, "u1": 0.5, "x0": -0.001}}}}
    assert recipe.fitted_at == (1.0, 0.8, 0.5, 0.2)
    assert Recipe.from_text(recipe.to_toml()) == recipe


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("0.5, 0.2]", "0.5]", "must give the noise level of each of the 4 steps"),
        ("weights.uncond.denoiser", "weights.cond.denoiser", "has no row in [timeline.cond]"),
        ("c2 = 0.75", "c3 = 0.75", "'c3' is no value that step 2 could know"),
        ("c2 = 0.75", "k2 = 0.75", "'k2' is no value that step 2 could know"),
        ("c2 = 0.75", "c2 = nan", "must be a finite number"),
        ("uncond", "both", "weights name the values of both branches"),
        ("denoiser", '"blocks.0-1"', "only the whole denoiser's inputs are kept"),
        ("2 = {", "two = {", "'two' must be the number of a step"),
        ("2 = {", "4 = {", "step 4 must be one of the 4 steps"),
        ("{ c2 = 0.75, u1 = 0.5, x0 = -1e-3 }", "{}", "sum up 1 to 8 values; found 0"),
    ],
)
def test_weights_that_cannot_be_right(old: str, new: str, says: str):
    assert old in WEIGHTED
    with pytest.raises(RecipeError) as caught:
        Recipe.from_text(WEIGHTED.replace(old, new))
    assert says in str(caught.value)


def test_storage_is_one_of_three():
    text = 'schema = 1\n[limits]\nstorage = "fp8"\n'
    assert Recipe.from_text(Recipe.from_text(text).to_toml()).storage == "fp8"
    with pytest.raises(RecipeError, match="must be one of model, fp8, cpu"):
        Recipe.from_text(text.replace("fp8", "int3"))
