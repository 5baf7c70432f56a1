"""From a name to a recipe file or a model folder: shipped names, paths, Hub ids.

A shipped name means the same from every folder, so it comes before a local folder of that name;
write "./name" for the folder.
"""

import re
from pathlib import Path

from dit_accel.errors import RecipeError, nearest

PACKAGE = Path(__file__).resolve().parent
RECIPES = PACKAGE / "recipes"
TOYS = PACKAGE / "toys"


def list_recipes() -> tuple[str, ...]:
    """Every name that resolves without a path or a network: "neutral", "toys/wan/balanced"..."""
    found = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.toml"))
    return ("neutral", *found)


def shipped_recipe(name: str) -> Path | None:
    """The file of a shipped recipe."""
    return RECIPES / f"{name}.toml" if name != "neutral" and name in list_recipes() else None


def local_recipe(name: str | Path) -> Path | None:
    """The file a path means: itself, or the recipe of a folder; None where nothing is there."""
    path = Path(name).expanduser()
    if not path.is_dir():
        return path if path.suffix == ".toml" else None
    if (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    inside = sorted(path.glob("*.toml"))
    if len(inside) > 1:
        names = ", ".join(each.name for each in inside)
        raise RecipeError(f"{path}: the folder holds several recipes: {names}. Give the path of one of them.")
    return inside[0] if inside else None


def is_path(name: str | Path) -> bool:
    """Written as a path: nothing else is tried for it."""
    return isinstance(name, Path) or name.endswith(".toml") or name.startswith((".", "/", "~"))


def hub_address(name: str) -> tuple[str, str] | None:
    """(repository, file) if the name can be a Hub id: "org/repo" or "org/repo/sub/name"."""
    parts = name.split("/")
    word = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
    if not 2 <= len(parts) <= 8 or not all(word.fullmatch(part) for part in parts):
        return None
    # a misspelt shipped name must not become a download from whoever owns that name on the Hub
    if parts[0] in {known.split("/")[0] for known in list_recipes()}:
        return None
    return "/".join(parts[:2]), f"{'/'.join(parts[2:]) or 'recipe'}.toml"


def not_found(name: str | Path, hub: str) -> RecipeError:
    """The error for a name that led nowhere: the three things that were tried."""
    known = list_recipes()
    inside = [each for each in known if each.startswith(f"{name}/")]
    shipped = (
        f"it is a folder of shipped recipes: {', '.join(inside)}"
        if inside
        else f"not a shipped recipe (nearest: {nearest(str(name), known)})"
    )
    return RecipeError(
        f'no recipe is called "{name}". Tried: (1) {shipped}; (2) not a .toml file or a folder with one; '
        f"(3) {hub}. "
        "Correct the name; dit_accel.recipe.list_recipes() lists the shipped ones."
    )


def resolve_model(name: str) -> str:
    """The folder of a shipped toy ("toys/wan"); any other path or Hub id comes back as it is."""
    if name != "toys" and not name.startswith("toys/"):
        return name
    known = sorted(
        f"toys/{folder.name}" for folder in TOYS.glob("*") if (folder / "model_index.json").is_file()
    )
    if name not in known:
        raise RecipeError(
            f'no toy model is called "{name}"; known: {", ".join(known) or "none"}. Correct the name.'
        )
    return str(TOYS / name.removeprefix("toys/"))
