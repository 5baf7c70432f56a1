"""The structure, held by reading the source: who imports whom, what may be named how, and what is banned."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dit_accel", "kernels", "pipelines", "scripts", "tests")
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if not any(parent.is_symlink() for parent in (path, *path.parents))
)

# From the ground up: a part imports from its own layer and those before it. "" is the package itself; what is
# not named here is a program, which may import everything but the command line.
LAYERS = (
    {"kernels"},
    {"errors"},
    {"registry", "recipe", "scenes"},
    {
        "bricks",
        "compat",
        "extrapolation",
        "families",
        "inventory",
        "memory",
        "other_caches",
        "run_report",
        "sites",
        "timeline",
        "tracker",
    },
    {"plan", "work"},
    {"session"},
    {"block_heads", "buckets", "units", "visit"},
    {"methods", "predict", "proxy", "spans", "whole"},
    {"block_hooks", "exact", "placement"},
    {"install"},
    {"api"},
    {""},
    {"program"},
    {"cli"},
    {"__main__"},
)
LAYER = {part: height for height, layer in enumerate(LAYERS) for part in layer}
APART = {"families": {"methods", "kernels"}, "methods": {"families"}, "recipe": {"kernels"}}

FORBIDDEN_STEMS = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "managers"}
FORBIDDEN_NAMES = re.compile(r"^(do_\w+|Base[A-Z]\w*|Pattern_\d+|\w+_v\d+)$")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
PRIVATE_FOREIGN = {"dit_accel/compat.py", "dit_accel/install.py", "dit_accel/proxy.py"}
NAMEDTUPLE = {"_replace", "_asdict", "_fields"}
LONG = 400
TORCH_FREE = ("dit_accel.errors", "dit_accel.registry", "dit_accel.recipe")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def part_of(path: Path) -> str:
    """The part a file belongs to: `methods`, `plan`, `kernels`; "" for the package itself."""
    return (our_part(module_name(path)) or "") if path.parts[0] == "dit_accel" else path.parts[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, in functions too; relative ones are resolved."""
    package = (
        module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
    )
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_name(path: Path) -> str:
    parts = path.parts[1:] if path.parts[0] == "kernels" else path.parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


def our_part(module: str) -> str | None:
    """The part that an imported name belongs to; None where it is not ours."""
    root, _, rest = module.partition(".")
    if root == "dit_accel_kernels":
        return "kernels"
    if root != "dit_accel" or not rest:
        return None
    name = rest.partition(".")[0]
    here = (ROOT / "dit_accel" / name).is_dir() or (ROOT / "dit_accel" / f"{name}.py").is_file()
    return (
        ("recipe" if name.startswith("recipe_") else name) if here else ""
    )  # recipe_parse is a part of recipe


def height_of(part: str) -> int:
    return LAYER.get(part, LAYER["program"])


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] in ("dit_accel", "kernels")], ids=str)
def test_imports_go_one_way(path: Path):
    part = part_of(path)
    for line, module in imports_of(path):
        other = our_part(module)
        if other is None or other == part:
            continue
        allowed = height_of(other) <= height_of(part) and other not in APART.get(part, ())
        assert allowed, (
            f"{path}:{line}: {part or 'dit_accel'} may not import {other or 'dit_accel'} ({module})"
        )


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if part_of(p) in ("families", "methods", "kernels")], ids=str
)
def test_a_family_and_a_method_know_no_pipeline(path: Path):
    assert not [module for _, module in imports_of(path) if module.startswith("diffusers.pipelines")], (
        f"{path}: only the denoiser's class name is known here, never a pipeline"
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] in ("dit_accel", "kernels")], ids=str)
def test_private_names_of_others_stay_in_three_files(path: Path):
    """What torch or diffusers may change without a word is touched only where the canary tests look."""
    if path.as_posix() in PRIVATE_FOREIGN:
        return
    text = (ROOT / path).read_text()
    for line, module in imports_of(path):
        private = [part for part in module.split(".") if re.match("_[a-z]", part)]
        assert not private or our_part(module) is not None, (
            f"{path}:{line}: {module} is private, see compat.py"
        )
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in NAMEDTUPLE:
            ours = re.search(rf"(def |self\.|cls\.|^    ){node.attr}\b", text, re.MULTILINE)
            assert ours, f"{path}:{node.lineno}: {node.attr} is private to somebody else, see compat.py"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_pickle_is_read_or_written(path: Path):
    for line, module in imports_of(path):
        assert module.split(".")[0] not in PICKLES, f"{path}:{line}: {module} can run code from a file"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            called = f"{node.value.id}.{node.attr}"
            allowed = called not in {"torch.load", "torch.save"}
            assert allowed, f"{path}:{node.lineno}: use safetensors"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}: say weights_only=True"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_names_say_what_things_are(path: Path):
    assert path.stem not in FORBIDDEN_STEMS, f"{path}: name the file after its one idea"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert not FORBIDDEN_NAMES.match(node.name), f"{path}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_long_file_gives_its_reason(path: Path):
    lines = (ROOT / path).read_text().splitlines()
    if len(lines) > LONG:
        head = " ".join(lines[:30])
        assert "over 400 lines because" in head, (
            f"{path}: {len(lines)} lines; split it, or say why not at the top"
        )


@pytest.mark.parametrize("module", TORCH_FREE)
def test_reading_a_recipe_needs_no_torch(module: str):
    code = f"import sys, {module}; print(*{{'torch', 'diffusers', 'numpy'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def method_names() -> list[str]:
    from dit_accel.registry import METHODS

    return sorted(METHODS.names())


def test_a_method_has_one_name_from_recipe_to_test():
    """Every registered method: a file of that name, a test that names it, a word in docs/DESIGN.md."""
    pytest.importorskip("dit_accel.registry")
    files = {path.stem for path in SOURCES if path.parts[:2] == ("dit_accel", "methods")}
    tests = "\n".join((ROOT / path).read_text() for path in SOURCES if path.parts[0] == "tests")
    design = (ROOT / "docs" / "DESIGN.md").read_text()
    for name in method_names():
        assert name in files, f"method {name}: no dit_accel/methods/*/{name}.py"
        assert re.search(rf"\b{name}\b", tests), f"method {name}: no test names it"
        assert f"`{name}`" in design, f"method {name}: docs/DESIGN.md does not explain it"


def test_a_method_file_is_registered():
    pytest.importorskip("dit_accel.registry")
    for path in SOURCES:
        if (
            path.parts[:2] == ("dit_accel", "methods")
            and len(path.parts) == 4
            and path.stem not in ("__init__", "base")
        ):
            assert path.stem in method_names(), f"{path} is in no registry"
