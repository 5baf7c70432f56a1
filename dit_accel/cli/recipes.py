"""`dit-accel recipes`: list, show and check recipe files; only `check` imports torch, for the methods."""

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.screen import Commands, Debug, asked_for, say, screen
from dit_accel.errors import BadUsage, RecipeError
from dit_accel.recipe import Recipe, list_recipes

recipes = typer.Typer(
    cls=Commands, no_args_is_help=True, help="List, show and check recipes.", rich_markup_mode="markdown"
)


@recipes.command("list")
def list_(debug: Debug = False) -> None:
    """The shipped recipes, and what each was made for.

    Example: `dit-accel recipes list`
    """
    rows = [("NAME", "MADE FOR", "STEPS", "METHODS")] + [
        _summary(Recipe.load(name)) for name in list_recipes()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) + f"  {row[3]}")


@recipes.command()
def show(
    name: Annotated[str, typer.Argument(help="A shipped name, a .toml file, or a Hub id.")],
    debug: Debug = False,
) -> None:
    """Print a recipe: the picture of what runs where and when.

    Example: `dit-accel recipes show toys/wan/balanced`
    """
    with asked_for():
        recipe = Recipe.load(name)
    text = recipe.file.read_text(encoding="utf-8") if recipe.file else recipe.to_toml()
    if screen.is_terminal:
        from rich.syntax import Syntax

        say(f"# {recipe.source}")
        screen.print(Syntax(text, "toml", background_color="default"))
    else:
        say(text)


@recipes.command()
def check(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Recipe files; all shipped ones if none is given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Validate recipe files: syntax, letters, lengths, methods, parameters. Exit code 1 if one is wrong.

    Example: `dit-accel recipes check my.toml`
    """
    missing = [file for file in files or () if not file.is_file()]
    if missing:
        raise BadUsage(f"asked to check {missing[0]}; there is no such file. Give the path of a .toml file.")
    names = [str(file) for file in files] if files else list(list_recipes())
    wrong = []
    for name in names:
        try:
            recipe = Recipe.from_file(name) if files else Recipe.load(name)
            for letter in recipe.choices:
                recipe.method(letter)
            for file in recipe.files:
                recipe.open_file(file)
        except RecipeError as error:
            wrong.append(str(error))
            continue
        say(f"{name}: ok, {_summary(recipe)[3]}")
    if wrong:
        raise RecipeError("\n".join(wrong))


def _summary(recipe: Recipe) -> tuple[str, str, str, str]:
    made_for = recipe.made_for
    methods = dict.fromkeys(choice.method for choice in recipe.choices.values())
    steps = str(made_for.steps) if made_for.steps else "any"
    return recipe.name, made_for.model or made_for.family or "any model", steps, " ".join(methods)
