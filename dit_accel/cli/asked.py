"""From what was typed to objects: the recipe, the loaded model, the arguments of its call."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.cli.screen import Once, asked_for, warn, working
from dit_accel.errors import BadUsage, ToyError
from dit_accel.recipe import Recipe, list_recipes

if TYPE_CHECKING:
    from dit_accel.loading import Model, Place


DEFAULTS = ("balanced", "safe")  # of a model's own recipes, the first that is shipped is taken


def choose_recipe(asked: str | None, model: str) -> Recipe | None:
    """The recipe asked for; without a word the one made for this model; None: run dense."""
    own = recipes_of(model)
    default = next((own[name] for name in DEFAULTS if name in own), None)
    name = default if asked is None else own.get(asked, asked)  # "fast" alone is this model's own
    if name is None:
        warn(f"no recipe is shipped for {model}: it runs dense. Give one with --recipe.")
    if name in (None, "none"):
        return None
    with asked_for():
        recipe = Recipe.load(name)
    if recipe.made_by.get("measured") is False:
        warn(f"the recipe {recipe.name} was not measured: what it gains and costs is not known.")
    return recipe


def need_recipe(asked: str | None, model: str) -> Recipe:
    """As `choose_recipe`, where running dense is no answer."""
    recipe = choose_recipe(asked, model)
    if recipe is None:
        found = "--recipe is none" if asked else "none was given and none is shipped for it"
        raise BadUsage(
            f"asked to use a recipe on {model}; {found}. "
            "Give --recipe NAME or FILE; `dit-accel recipes list` has the names."
        )
    return recipe


def recipes_of(model: str) -> dict[str, str]:
    """Shipped recipes made for a model, by their last word: {"balanced": "toys/wan/balanced"}."""
    names = [name for name in list_recipes() if "/" in name]
    return {name.rpartition("/")[2]: name for name in names if Recipe.load(name).made_for.model == model}


def load_model(name: str, place: "Place", asked: Mapping[str, Any]) -> tuple["Model", dict[str, Any]]:
    """The model on its device, and the arguments of its call."""
    import diffusers
    import transformers

    from dit_accel.generate import call_arguments
    from dit_accel.loading import load

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(Once())
    with working(f"loading {name}"):
        model = load(name, place)
    if place.offload and model.pipe.device.type == "cpu":
        warn("--offload does nothing on a CPU: the modules already are in host memory.")
    if model.defaults.get("trained") is False:
        warn(f"{name} is not trained: its pictures are noise.")
    return model, call_arguments(model, asked)


def read_image(path: Path | None) -> Any:
    """The start image of an image-to-video model."""
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise BadUsage(
            f"asked for the image {path}; it cannot be read ({error}). Give a PNG or JPEG file."
        ) from error


def check_prompt(model: "Model", prompt: str) -> None:
    """A toy knows few words: say when a prompt has others."""
    if not model.draws_scenes:
        return
    from dit_accel.scenes import parse

    try:
        parse(prompt)
    except ToyError as error:
        warn(f"{model.name} was trained on a small language and will not understand this prompt. {error}")


def check_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before the work they are for."""
    for path in filter(None, paths):
        if path.is_dir():
            raise BadUsage(f"asked to write {path}; it is a folder. Give a file name.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadUsage(
                f"asked to write {path}; its folder cannot be made ({error}). Give another."
            ) from error
