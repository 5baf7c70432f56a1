"""The two tables: built-in entries, third-party entries, and what neither may be."""

from dataclasses import dataclass, make_dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from dit_accel.errors import DitAccelError
from dit_accel.registry import (
    FAMILIES,
    FAMILY_ATTRIBUTES,
    METHODS,
    Registry,
    register_family,
    register_method,
)


@dataclass(frozen=True)
class Probe:
    seams: ClassVar[frozenset[str]] = frozenset({"attention"})
    strength: float = 1.0


@dataclass(frozen=True)
class Other(Probe):
    pass


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(METHODS, "_objects", dict(METHODS._objects))
    monkeypatch.setattr(FAMILIES, "_objects", dict(FAMILIES._objects))


def family(**changes):
    facts = dict.fromkeys(FAMILY_ATTRIBUTES, ()) | {
        "name": "probe",
        "transformers": ("ProbeModel",),
        "token_order": "visual",
        "guidance": "batched",
        "grid": lambda config, kwargs: (1, 2, 3),
    }
    return SimpleNamespace(**(facts | changes))


def test_built_in_names_are_listed_without_importing_a_method():
    expected = (
        *("full", "window", "arrow", "brick", "coreset", "tail", "residual"),
        *("reuse", "share_branch", "forecast", "fitted", "skip", "compute"),
    )
    assert METHODS.names()[: len(expected)] == expected
    assert "WanTransformer3DModel" in FAMILIES.names()


def test_a_registered_method_is_found_and_may_be_registered_twice():
    register_method("probe", Probe)
    register_method("probe", Probe)
    assert METHODS.get("probe") is Probe
    assert "probe" in METHODS and "probe" in METHODS.names()


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(DitAccelError, match=r'no method is called "ful"; known: full,.*register_method'):
        METHODS.get("ful")


def test_a_taken_name_is_refused_and_keeps_its_class():
    register_method("probe", Probe)
    with pytest.raises(DitAccelError, match=r'"probe".*taken by .*Probe.*another name'):
        register_method("probe", Other)
    assert METHODS.get("probe") is Probe


@pytest.mark.parametrize("name", ["Probe", "my-probe", "", "1st", "probe\n"])
def test_a_method_name_must_be_a_lower_case_word(name):
    with pytest.raises(DitAccelError, match="lower-case word"):
        register_method(name, Probe)


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(type("Plain", (), {"seams": frozenset({"attention"})}), id="no_dataclass"),
        pytest.param(make_dataclass("Thawed", []), id="not_frozen"),
        pytest.param(Probe(), id="an_instance"),
    ],
)
def test_a_method_must_be_a_frozen_dataclass(cls):
    with pytest.raises(DitAccelError, match=r"not a frozen dataclass.*frozen=True"):
        register_method("probe", cls)


@pytest.mark.parametrize("seams", [None, frozenset(), {"attention"}, frozenset({"atention"})], ids=repr)
def test_a_method_must_say_its_seams(seams):
    cls = make_dataclass("Seamless", [], frozen=True, namespace={"seams": seams})
    with pytest.raises(DitAccelError, match=r"seams is .*'attention', 'timeline'"):
        register_method("probe", cls)


def test_an_entry_whose_module_is_missing_names_the_module_and_keeps_the_cause():
    table = Registry("method", {"gone": "dit_accel.no_such_module:Gone"}, lambda name, value: None)
    with pytest.raises(DitAccelError, match=r"dit_accel\.no_such_module:Gone.*cannot be imported") as error:
        table.get("gone")
    assert isinstance(error.value.__cause__, ImportError)


def test_an_entry_is_imported_once_and_checked():
    seen = []
    table = Registry("thing", {"join": "os.path:join"}, lambda name, value: seen.append(name))
    assert table.get("join") is table.get("join")
    assert seen == ["join"]


def test_a_family_is_known_by_each_of_its_denoisers():
    probe = family(transformers=("ProbeModel", "ProbeModelTwo"))
    register_family(probe)
    assert FAMILIES.get("ProbeModelTwo") is probe
    assert FAMILIES.get("ProbeModel") is probe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers": ()}, "transformers is empty"),
        ({"name": "Probe"}, "lower-case words"),
        ({"token_order": "text"}, "token_order is 'text'.*visual,text"),
        ({"guidance": "none"}, "guidance is 'none'.*sequential; batched"),
        ({"grid": (1, 2, 3)}, "must be a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_family_says_what_is_wrong(changes, message):
    with pytest.raises(DitAccelError, match=message):
        register_family(family(**changes))
    assert "ProbeModel" not in FAMILIES


def test_a_family_without_an_attribute_names_it():
    probe = family()
    del probe.fps, probe.grid
    with pytest.raises(DitAccelError, match="has no grid, fps"):
        register_family(probe)


def test_a_family_cannot_take_a_known_denoiser_and_then_registers_nothing():
    register_family(family(transformers=("TakenModel",)))
    with pytest.raises(DitAccelError, match=r"TakenModel belongs to family.*Remove the class"):
        register_family(family(name="second", transformers=("FreshModel", "TakenModel")))
    assert "FreshModel" not in FAMILIES
