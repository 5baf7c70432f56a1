"""Recipes: which method runs at which site, on a timeline, as a picture that a person can read.

A recipe validates alone: an unknown key, letter or method, a wrong length or type is a RecipeError
that names file and line. Nothing here imports torch; `plan` fits the recipe to a pipeline.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from dit_accel.errors import RecipeError, nearest
from dit_accel.recipe_check import check
from dit_accel.recipe_files import commit_of, copy_beside, download, verified, write_whole
from dit_accel.recipe_method import build_method
from dit_accel.recipe_names import (
    hub_address,
    is_path,
    list_recipes,
    local_recipe,
    not_found,
    resolve_model,
    shipped_recipe,
)
from dit_accel.recipe_parse import AUTO, Choice, ExactTables, MadeFor, Places, parse
from dit_accel.recipe_toml import parse_toml, quote, read_text, write_table, write_timeline

__all__ = ["AUTO", "Choice", "ExactTables", "MadeFor", "Recipe", "list_recipes", "resolve_model"]

# branch -> site pattern -> one string per noise interval
Pictures = Mapping[str, Mapping[str, tuple[str, ...]]]
# branch -> site pattern -> one letter per step
Timelines = Mapping[str, Mapping[str, str]]
# branch -> site pattern -> step -> weights of the stored values whose sum answers: "c3" is the site's value
# of cond at step 3, "u3" that of uncond, "x3" what the denoiser was called with
Weights = Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]
EXACT = frozenset({"full", "compute"})


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. Sites that no row matches run as the plain pipeline runs them."""

    name: str = field(default="recipe", compare=False)
    source: str = field(default="<recipe>", compare=False)  # where it came from, for error messages
    made_for: MadeFor = field(default_factory=MadeFor)
    choices: Mapping[str, Choice] = field(default_factory=dict[str, Choice])
    edges: tuple[float, ...] = (1.0, 0.0)  # noise levels between the intervals, falling
    attention: Pictures = field(default_factory=dict[str, Mapping[str, tuple[str, ...]]])
    timeline: Timelines = field(default_factory=dict[str, Mapping[str, str]])
    weights: Weights = field(default_factory=dict[str, Mapping[str, Mapping[int, Mapping[str, float]]]])
    fitted_at: tuple[float, ...] = ()  # the noise level of each step at which `weights` were fitted
    memory_gb: float | None = None
    storage: str = "model"  # how the timeline's outputs are stored: "model" (their own dtype), "fp8" or "cpu"
    exact: ExactTables = field(default_factory=ExactTables)
    files: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> sha256
    made_by: Mapping[str, Any] = field(default_factory=dict[str, Any])
    places: Places = field(default=Places("<recipe>"), compare=False, repr=False)
    folder: Path | None = field(default=None, compare=False, repr=False)  # where its files lie
    file: Path | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def neutral(cls) -> "Recipe":
        """Everything installed, everything `full` or `compute`: bit-equal to the plain pipeline."""
        choices = {"F": Choice("F", "full"), "C": Choice("C", "compute")}
        return cls(
            name="neutral",
            source="neutral",
            made_for=MadeFor(steps=1),
            choices=choices,
            attention={"both": {"*": ("F",)}},
            timeline={"both": {"*": "C"}},
            places=Places("neutral"),
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "recipe", source: str = "<dict>") -> "Recipe":
        """A recipe from tables as `tomllib` gives them."""
        places = Places(source)
        return cls(name=name, source=source, places=places, **parse(data, places))

    @classmethod
    def from_text(cls, text: str, name: str = "recipe", source: str = "<text>") -> "Recipe":
        """A recipe from TOML text."""
        return cls._from_text(text, name, source, None)

    @classmethod
    def from_file(cls, path: str | Path) -> "Recipe":
        """A recipe from a .toml file."""
        path = Path(path).expanduser()
        return cls._from_text(read_text(path), path.stem, str(path), path)

    @classmethod
    def from_hub(cls, repo_id: str, filename: str = "recipe.toml", revision: str | None = None) -> "Recipe":
        """A recipe from a Hub repository, with the files it names, all from one commit."""
        path = download(repo_id, filename, revision)
        name = f"{repo_id}/{filename.removesuffix('.toml')}"
        recipe = cls._from_text(read_text(path), name, f"hub:{repo_id}/{filename}", path)
        for each in recipe.files:
            parent = filename.rpartition("/")[0]
            download(repo_id, f"{parent}/{each}" if parent else each, commit_of(path) or revision)
            recipe.open_file(each)
        return recipe

    @classmethod
    def load(cls, what: "str | Path | Recipe") -> "Recipe":
        """A recipe from a shipped name, a path, a Hub id, or itself."""
        if isinstance(what, Recipe):
            return what
        if not isinstance(what, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RecipeError(f"a recipe is a name, a path or a Recipe; got {type(what).__name__}.")
        if what == "neutral":
            return cls.neutral()
        if not is_path(what) and (path := shipped_recipe(str(what))):
            return cls._from_text(read_text(path), str(what), str(path), path)
        if path := local_recipe(what):
            return cls.from_file(path)
        address = None if is_path(what) else hub_address(str(what))
        if address is None:
            raise not_found(what, "not a Hub id such as org/repo")
        try:
            return cls.from_hub(*address)
        except RecipeError as error:
            if not isinstance(error.__cause__, Exception) or not str(error).startswith("hub:"):
                raise
            raise not_found(what, str(error)) from error

    @classmethod
    def _from_text(cls, text: str, name: str, source: str, file: Path | None) -> "Recipe":
        data, lines = parse_toml(text, source)
        # an empty recipe has no keys, and errors still point at its first line
        places = Places(source, lines or {("schema",): 1})
        folder = file.parent if file else None
        return cls(name=name, source=source, places=places, folder=folder, file=file, **parse(data, places))

    def where(self, *path: str) -> str:
        """ "file.toml:12" of a key: where("attention", "both", "blocks.*.attn1")."""
        return self.places.where(*path)

    def fail(self, path: tuple[str, ...], message: str) -> NoReturn:
        """Raise a RecipeError about one key."""
        self.places.fail(path, message)

    def method(self, letter: str) -> Any:
        """The method of a letter with its parameters: an instance of the method's dataclass."""
        if letter not in self.choices:
            self.fail(
                ("choices",),
                f'[choices] has no "{letter}"; declared: {" ".join(self.choices) or "none"}. Declare it.',
            )
        return build_method(self.choices[letter], self.places)

    def letters(self) -> frozenset[str]:
        """The letters that the picture uses."""
        heads = [string for rows in self.attention.values() for row in rows.values() for string in row]
        steps = [row for rows in self.timeline.values() for row in rows.values()]
        return frozenset("".join(heads + steps))

    def is_neutral(self) -> bool:
        """Whether nothing but `full` and `compute` without parameters is used."""
        return self.is_exact() and not any(self.choices[letter].parameters for letter in self.letters())

    def is_exact(self) -> bool:
        """Whether nothing but `full`, by whatever backend, and `compute` is used."""
        return all(self.choices[letter].method in EXACT for letter in self.letters())

    def open_file(self, name: str) -> Path:
        """The path of a file of [files], after its place and its sha256 were checked."""
        if name not in self.files:
            self.fail(
                ("files",),
                f'[files] lists no "{name}"; listed: {nearest(name, self.files)}. Add it with its sha256.',
            )
        if self.folder is None or self.file is None:
            self.fail(
                ("files", name),
                f"[files] {name}: this recipe came from no file: nothing lies beside it. Save it first.",
            )
        return verified(self.folder, name, self.files[name], self.file, self.where("files", name))

    def to_toml(self) -> str:
        """The recipe as text; reading it again gives an equal recipe."""
        made_for = {key: value for key, value in asdict(self.made_for).items() if value is not None}
        choices = {
            key: {"method": choice.method, **choice.parameters} for key, choice in self.choices.items()
        }
        tables = ["schema = 1\n"]
        tables += [write_table("made_for", made_for)] if made_for else []
        tables += [write_table("choices", choices)] if choices else []
        limits = {"memory_gb": self.memory_gb} if self.memory_gb is not None else {}
        limits |= {"storage": self.storage} if self.storage != "model" else {}
        tables += [write_table("limits", limits)] if limits else []
        tables += [write_table("exact", asdict(self.exact))] if self.exact != ExactTables() else []
        tables += [write_table("noise", {"edges": self.edges})] if len(self.edges) > 2 else []
        tables += [
            write_table(f"attention.{branch}", rows, quoted=True) for branch, rows in self.attention.items()
        ]
        tables += [write_timeline(f"timeline.{branch}", rows) for branch, rows in self.timeline.items()]
        tables += [write_table("weights", {"levels": self.fitted_at})] if self.weights else []
        tables += [
            write_table(f"weights.{branch}.{quote(site)}", {str(step): sum_ for step, sum_ in rows.items()})
            for branch, sites in self.weights.items()
            for site, rows in sites.items()
        ]
        tables += [write_table("files", self.files, quoted=True)] if self.files else []
        tables += [write_table("made_by", self.made_by)] if self.made_by else []
        return "\n".join(tables)

    def save(self, path: str | Path) -> Path:
        """Write the recipe, and copy the files it names beside it; the file appears whole or not at all."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.folder is not None:
            copy_beside(path.parent, {name: self.open_file(name) for name in self.files})
        write_whole(path, self.to_toml())
        return path
