"""What an installation must carry; `make wheel-test` runs the expensive half on a real wheel."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIG["project"]


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


def test_every_kernel_source_and_record_is_packed():
    """What a kernel is built from at first use, its tiles, and `verified.json`, which `auto` asks."""
    package = ROOT / "kernels" / "dit_accel_kernels"
    patterns = CONFIG["tool"]["setuptools"]["package-data"]["dit_accel_kernels"]
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert sorted(files - packed) == []
    assert {"cuda.cu", "hopper.cuh", "arguments.h", "verified.json"} <= {path.name for path in packed}


def test_every_hard_dependency_is_pinned():
    pinned = {line.split("==")[0].lower().replace("-", "_") for line in _lines("constraints.txt")}
    wanted = {_name(requirement) for requirement in PROJECT["dependencies"]}
    assert wanted <= pinned


def test_the_oldest_pins_are_the_declared_lower_bounds():
    oldest = dict(line.split("==") for line in _lines("constraints-oldest.txt"))
    assert f"diffusers>={oldest['diffusers'].removesuffix('.0')}" in PROJECT["dependencies"]


@pytest.mark.parametrize("pins", sorted(path.name for path in ROOT.glob("constraints-triton-*.txt")))
def test_ci_checks_the_kernels_on_every_pinned_triton_and_each_has_a_budget(pins: str):
    version = dict(line.split("==") for line in _lines(pins))["triton"]
    assert pins == f"constraints-triton-{version.removesuffix('.0')}.txt"
    assert (ROOT / "kernels" / "budget" / f"triton-{version}.json").is_file()
    assert f"make kernels-check TRITON={version.removesuffix('.0')}" in (ROOT / ".ci/run").read_text()


def test_the_library_imports_only_what_it_declares():
    """A module's imports are hard dependencies, or what diffusers and transformers themselves require."""
    brought = [r for name in ("diffusers", "transformers") for r in importlib.metadata.requires(name) or ()]
    required = [*PROJECT["dependencies"], *(r for r in brought if "extra ==" not in r)]
    known = {_name(requirement) for requirement in required} | {"dit_accel", "dit_accel_kernels"}
    for path in (*ROOT.glob("dit_accel/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        # a backend's own files: `dispatch` imports them only to ask, and takes an ImportError for a reason
        optional = {"triton"} if path.stem.startswith("triton") or path.stem == "ahead" else set()
        # and what draws says that matplotlib is missing
        plots = ("dit_accel/train/plot.py", "dit_accel/bench/pareto.py")
        optional |= {"matplotlib"} if any(path.match(each) for each in plots) else set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for root in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                name = {"PIL": "pillow"}.get(root, root)
                assert name in known | optional, (
                    f"{path}:{node.lineno}: {root} is not among the hard dependencies"
                )


def _lines(file: str) -> list[str]:
    lines = (ROOT / file).read_text().splitlines()
    return [line for line in lines if "==" in line and not line.startswith("#")]


def _name(requirement: str) -> str:
    """The distribution's name in a requirement such as `huggingface-hub<3,>=1.32`, spelt as an import."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("-", "_")
