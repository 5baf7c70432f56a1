"""What an installation must carry; `make wheel-test` runs the expensive half on a real wheel."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(("link", "target"), [("recipes", "recipes"), ("toys", "pipelines/toys")])
def test_the_data_folders_are_links_into_the_package(link: str, target: str):
    path = ROOT / "dit_accel" / link
    assert path.is_symlink(), f"{path} must be a link (a checkout without symlink support?)"
    assert not Path(path.readlink()).is_absolute()
    assert path.resolve() == (ROOT / target).resolve()


@pytest.mark.parametrize("root", ["kernels", "pipelines"])
def test_source_roots_are_no_packages(root: str):
    """A top-level kernels/__init__.py shadows Hugging Face's `kernels` for all who start Python here."""
    assert not (ROOT / root / "__init__.py").exists()


def test_only_our_two_names_are_installed():
    top_level = {
        name for name, owners in importlib.metadata.packages_distributions().items() if "dit_accel" in owners
    }
    assert {name for name in top_level if not name.startswith("__editable__")} <= {
        "dit_accel",
        "dit_accel_kernels",
    }


def test_the_command_points_at_the_cli():
    assert PROJECT["scripts"] == {"dit-accel": "dit_accel.cli:main"}


def test_every_hard_dependency_is_pinned():
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in _lines("constraints.txt")}
    wanted = {_name(requirement) for requirement in PROJECT["dependencies"]}
    assert wanted <= pinned


def test_the_oldest_pins_are_the_declared_lower_bounds():
    oldest = dict(line.split("==") for line in _lines("constraints-oldest.txt"))
    assert f"diffusers>={oldest['diffusers'].removesuffix('.0')}" in PROJECT["dependencies"]


def _lines(file: str) -> list[str]:
    lines = (ROOT / file).read_text().splitlines()
    return [line for line in lines if "==" in line and not line.startswith("#")]


def _name(requirement: str) -> str:
    return requirement.partition(">=")[0].partition("[")[0].lower().replace("-", "_")
