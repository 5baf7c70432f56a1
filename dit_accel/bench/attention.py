"""The same attention for all columns: the model's own, or our op beneath dense, rivals and recipes alike.

A recipe whose full heads go through our op is faster than dense for two reasons. With the op beneath every
column only the recipe's own reason is left.
"""

import string
from dataclasses import replace

from dit_accel.errors import BadUsage
from dit_accel.recipe import Recipe

SERVED_BY = ("model", "op")
EVERYTHING = "*"
TOOK_DENSE = {"backend": "auto"}  # our fastest, and the model's own where that is faster


def check_attention(asked: str) -> str:
    """One of SERVED_BY, or BadUsage."""
    if asked not in SERVED_BY:
        raise BadUsage(f"asked for --attention {asked}; it is model or op. Give one of them.")
    return asked


def through_op(recipe: Recipe) -> Recipe:
    """The recipe with the heads that it leaves full, and the layers that it does not name, through our op."""
    choices = {
        letter: replace(choice, parameters={**TOOK_DENSE, **choice.parameters})
        if choice.method == "full"
        else choice
        for letter, choice in recipe.choices.items()
    }
    full = [letter for letter, choice in choices.items() if choice.method == "full"]
    letter = full[0] if full else next(each for each in string.ascii_letters if each not in choices)
    if not full:
        made = Recipe.from_dict({"schema": 1, "choices": {letter: {"method": "full", **TOOK_DENSE}}})
        choices |= dict(made.choices)
    rows = (letter,) * (len(recipe.edges) - 1)
    # of several patterns the later one wins
    both = {EVERYTHING: rows} | dict(recipe.attention.get("both", {}))
    return replace(recipe, choices=choices, attention={**recipe.attention, "both": both})


def dense_through_op() -> Recipe:
    """Nothing but full attention, through our op."""
    nothing = {"schema": 1, "exact": {"modulation": False, "text_kv": False}}
    return through_op(Recipe.from_dict(nothing, name="dense"))
