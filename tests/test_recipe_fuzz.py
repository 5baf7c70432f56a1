"""Broken recipes by the thousand: each is read, or refused by a RecipeError with file and line."""

import datetime
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_accel.errors import RecipeError
from dit_accel.recipe import Recipe

SOURCE = "fuzz.toml"
TEXT = """\
schema = 1
[made_for] # comment
family = "wan"
steps  = 4
grid   = [2, 3, 4]
[choices]
F = { method = "full" }
b = { method = "window", radius = [1, 2, 3] }
C = { method = "compute" }
[noise]
edges = [1.0, 0.5, 0.0]
[limits]
memory_gb = 2
[attention.both]
"blocks.0.attn1" = ["Fb", "bb"]
[timeline.cond]
"blocks.1-2" = "CCFC"
[files]
"a/b.safetensors" = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
[made_by]
note = '''x = [
y'''
"""
LINES = TEXT.splitlines(keepends=True)
PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        "=",
        ",",
        ".",
        '"',
        "'",
        '"""',
        "'''",
        "#",
        "\n",
        "\r\n",
        "\r",
        "\\",
        "\x00",
        "\t",
        "-",
        "*",
    ),
    *("[[", "nan", "inf", "-1", "1e999", "0x1", "true", "1979-05-27", "é", "\u2028", "🐈", "..", "made_for"),
    *("blocks.*.attn1", "both", "method", "[files]\n", "[choices.F]\n", "a.b = 1\n"),
    *("9" * 50, "[" * 50, "{a=" * 50, "a." * 50),
]
named_error = re.compile(rf"{re.escape(SOURCE)}:(\d+): \S")


def read_or_refuse(text: str) -> Recipe | None:
    """The recipe, or None for an error that names file, an existing line and something to do."""
    try:
        return Recipe.from_text(text, source=SOURCE)
    except RecipeError as error:
        named = named_error.match(str(error))
        assert named, f"no file and line: {error}"
        assert 1 <= int(named[1]) <= text.count("\n") + 1, f"no such line: {error}"
        assert len(str(error)) < 2_000
        return None


fuzz = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def edited(draw) -> str:
    """The valid recipe after a few cuts, insertions and moved lines."""
    text = TEXT
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        new = draw(
            st.one_of(st.just(""), st.sampled_from(PIECES), st.text(max_size=4), st.sampled_from(LINES))
        )
        text = text[:start] + new + text[end:]
    return text


@settings(fuzz, max_examples=1800)
@given(edited())
def test_an_edited_recipe_is_read_or_refused_by_name(text):
    recipe = read_or_refuse(text)
    if recipe is not None:
        assert Recipe.from_text(recipe.to_toml()) == recipe


@settings(fuzz, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(LINES), st.text(max_size=6)), max_size=20))
def test_any_text_is_read_or_refused_by_name(pieces):
    read_or_refuse("".join(pieces))


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.dates(),
    st.binary(max_size=2),
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = [
    *(
        ("schema",),
        ("made_for",),
        ("made_for", "steps"),
        ("made_for", "grid"),
        ("made_for", "model"),
        ("choices",),
    ),
    *(
        ("choices", "F"),
        ("choices", "F", "method"),
        ("choices", "b", "radius"),
        ("noise",),
        ("noise", "edges"),
    ),
    *(
        ("limits", "memory_gb"),
        ("attention",),
        ("attention", "both"),
        ("attention", "both", "blocks.0.attn1"),
    ),
    *(("timeline", "cond"), ("timeline", "cond", "blocks.1-2"), ("timeline", "cond", "blocks.*"), ("files",)),
    *(("files", "a/b.safetensors"), ("made_by",), ("made_by", "note"), ("other",)),
]


@settings(fuzz, max_examples=1000)
@given(st.sampled_from(PATHS), values)
def test_any_value_anywhere_is_accepted_or_refused_by_name(path, value):
    data = tables()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        recipe = Recipe.from_dict(data, source=SOURCE)
    except RecipeError as error:
        assert str(error).startswith(f"{SOURCE}: ")
    else:
        assert Recipe.from_text(recipe.to_toml()) == recipe


def tables() -> dict:
    """TEXT as tables, new for every example."""
    return {
        "schema": 1,
        "made_for": {"family": "wan", "steps": 4, "grid": [2, 3, 4]},
        "choices": {
            "F": {"method": "full"},
            "b": {"method": "window", "radius": [1, 2, 3]},
            "C": {"method": "compute"},
        },
        "noise": {"edges": [1.0, 0.5, 0.0]},
        "limits": {"memory_gb": 2},
        "attention": {"both": {"blocks.0.attn1": ["Fb", "bb"]}},
        "timeline": {"cond": {"blocks.1-2": "CCFC"}},
        "files": {"a/b.safetensors": "00112233445566778899aabbccddeeff" * 2},
        "made_by": {"note": "x = [\ny"},
    }


@pytest.mark.parametrize("text", [TEXT])
def test_the_recipe_that_is_broken_above_is_whole(text):
    assert read_or_refuse(text) == Recipe.from_dict(tables())


heads = st.text(st.sampled_from("FbC"), min_size=3, max_size=3)
sites = st.builds("blocks.{}.attn1".format, st.integers(0, 99))
rows = st.dictionaries(sites, st.lists(heads, min_size=2, max_size=2), max_size=3)
words = st.text(st.characters(codec="utf-8"), max_size=8)
notes = st.one_of(
    *(st.booleans(), st.integers(-(2**63) + 1, 2**63 - 1), words, st.dates()),
    st.floats(allow_nan=False, allow_infinity=False),
    st.datetimes(timezones=st.sampled_from([None, datetime.UTC])),
)


@settings(fuzz, max_examples=200)
@given(rows, rows, st.dictionaries(words, notes, max_size=4))
def test_writing_any_valid_recipe_and_reading_it_gives_an_equal_one(attention, other, made_by):
    data = tables() | {"attention": {"both": attention, "uncond": other}, "made_by": made_by}
    recipe = Recipe.from_dict(data)
    assert Recipe.from_text(recipe.to_toml()) == recipe
