"""Parameters of a choice become the fields of its method, or an error with file and line."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from dit_accel.errors import RecipeError
from dit_accel.recipe import Recipe
from dit_accel.registry import METHODS, register_method


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


def choices(parameters: str) -> Recipe:
    return Recipe.from_text(
        f'schema = 1\n[choices]\nP = {{ method = "probe", {parameters} }}', source="my.toml"
    )


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
