"""What must be true of a recipe on its own, before any pipeline is seen.

Every letter is declared, every string has its length, every site pattern can be read. Whether a
site exists, and whether a reuse has something to reuse, only the plan can say.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from dit_accel.errors import nearest
from dit_accel.recipe_parse import AUTO, shown
from dit_accel.registry import METHODS

if TYPE_CHECKING:
    from dit_accel.recipe import Recipe

BRANCHES = ("both", "cond", "uncond")
DENOISER = "denoiser"  # on the timeline: the whole denoiser, from its inputs to its output
STORAGE = ("model", "fp8", "cpu")
MAX_STEPS = 10_000
MAX_WEIGHTS = 8  # what one call of the op `history_mix` takes
MAX_INTERVALS = 1_000
MAX_HEADS = 1_024
MAX_INDEX = 9_999

_INDEX = r"(?:\*|\d{1,4}(?:-\d{1,4})?)"
# "blocks.3", "blocks.*.attn1", "transformer_2.transformer_blocks.0-5.attn"; "*" is every site
_PATTERN = re.compile(
    r"\*|(?:transformer(?:_2)?\.)?denoiser|"
    rf"(?:transformer(?:_2)?\.)?[A-Za-z_]\w*\.{_INDEX}(?P<inside>(?:\.\w+)*)",
    re.ASCII,
)
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*\.safetensors")


def check(recipe: "Recipe") -> None:
    """Raise RecipeError, with file and line, at the first thing that cannot be right."""
    _check_made_for(recipe)
    _check_choices(recipe)
    _check_edges(recipe)
    for seam in ("attention", "timeline"):
        for branch, rows in getattr(recipe, seam).items():
            if branch not in BRANCHES:
                recipe.fail(
                    (seam, branch),
                    f"[{seam}.{branch}] is no branch; nearest: {nearest(branch, BRANCHES)}. "
                    f"Rows stand in [{seam}.both], [{seam}.cond] or [{seam}.uncond].",
                )
            for pattern, row in rows.items():
                _check_pattern(recipe, seam, branch, pattern)
                if seam == "attention":
                    _check_heads(recipe, branch, pattern, row)
                else:
                    _check_steps(recipe, branch, pattern, row)
    _check_weights(recipe)
    _check_exact(recipe)
    _check_files(recipe)
    if recipe.storage not in STORAGE:
        recipe.fail(
            ("limits", "storage"),
            f"[limits] storage must be one of {', '.join(STORAGE)}; found {shown(recipe.storage)}. "
            "Say how stored outputs are kept: as the model made them, in 8 bits, or in the CPU's memory.",
        )
    if recipe.memory_gb is not None and not recipe.memory_gb > 0:
        recipe.fail(
            ("limits", "memory_gb"),
            f"[limits] memory_gb must be over 0; found {recipe.memory_gb}. "
            "Give the gigabytes that the recipe may keep.",
        )


def _check_made_for(recipe: "Recipe") -> None:
    made_for = recipe.made_for

    def require(right: bool, key: str, wanted: str) -> None:
        if not right:
            recipe.fail(
                ("made_for", key),
                f"[made_for] {key} must be {wanted}; found {shown(getattr(made_for, key))}.",
            )

    steps, grid, branches = made_for.steps, made_for.grid, made_for.branches
    require(
        steps is None or (_whole(steps) and 1 <= steps <= MAX_STEPS),
        "steps",
        f"a whole number from 1 to {MAX_STEPS}",
    )
    require(
        grid is None
        or (isinstance(grid, tuple) and len(grid) == 3 and all(_whole(size) and size >= 1 for size in grid)),
        "grid",
        "three whole numbers from 1: frames, rows, columns in tokens",
    )
    require(
        branches is None
        or (isinstance(branches, tuple) and bool(branches) and all(name in BRANCHES for name in branches)),
        "branches",
        f"a list of {', '.join(BRANCHES)}",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choices(recipe: "Recipe") -> None:
    for letter, choice in recipe.choices.items():
        path = ("choices", letter)
        if not re.fullmatch("[A-Za-z0-9]", letter) or choice.letter != letter:
            recipe.fail(path, f'[choices] "{letter}" is no letter: use one character of A-Z, a-z or 0-9.')
        if choice.method not in METHODS:
            recipe.fail(
                (*path, "method"),
                f'[choices] {letter}: no method is called "{choice.method}"; nearest: '
                f"{nearest(choice.method, METHODS.names())}. Correct it, or register it before loading.",
            )


def _check_edges(recipe: "Recipe") -> None:
    edges, path = recipe.edges, ("noise", "edges")
    if len(edges) < 2 or edges[0] != 1.0 or edges[-1] != 0.0:
        recipe.fail(
            path,
            f"[noise] edges must run from 1.0 to 0.0; found {shown(list(edges))}. Example: [1.0, 0.6, 0.0]",
        )
    if len(edges) > MAX_INTERVALS + 1:
        recipe.fail(path, f"[noise] edges makes {len(edges) - 1} intervals, over {MAX_INTERVALS}. Use fewer.")
    for high, low in pairwise(edges):
        if not high > low:
            recipe.fail(
                path,
                f"[noise] edges must fall at every step; found {high} before {low}. Sort them.",
            )


def _check_pattern(recipe: "Recipe", seam: str, branch: str, pattern: str) -> None:
    path = (seam, branch, pattern)
    found = _PATTERN.fullmatch(pattern) if len(pattern) <= 200 else None
    if not found:
        recipe.fail(
            path,
            f"[{seam}.{branch}] {shown(pattern)} is no site. Write a list of blocks, an index, a range or *, "
            'and what is inside ("blocks.7.attn1", "blocks.0-5.ffn", "blocks.*.attn1"), or "blocks.1-6".',
        )
    if seam == "attention" and not found["inside"] and pattern != "*":
        recipe.fail(
            path,
            f'[{seam}.{branch}] "{pattern}" names whole blocks, not an attention. Write "{pattern}.attn1".',
        )
    for first, last in re.findall(r"\.(\d+)-(\d+)", pattern):
        if int(first) > int(last):
            recipe.fail(
                path, f'[{seam}.{branch}] "{pattern}" runs backwards. Write the range as {last}-{first}.'
            )


def _check_letters(recipe: "Recipe", path: tuple[str, ...], letters: str) -> None:
    for letter in sorted(set(letters)):
        if letter not in recipe.choices:
            recipe.fail(
                path,
                f'{_row(path)} uses the letter "{letter}", which [choices] does not declare; declared: '
                f"{' '.join(recipe.choices) or 'none'}. Declare it or use another.",
            )


def _check_heads(recipe: "Recipe", branch: str, pattern: str, row: tuple[str, ...]) -> None:
    path = ("attention", branch, pattern)
    intervals = len(recipe.edges) - 1
    if len(row) != intervals:
        recipe.fail(
            path,
            f"{_row(path)} has {len(row)} strings, but [noise] edges makes {intervals} intervals. "
            "Give one string per interval.",
        )
    heads = {len(string) for string in row} - {1}
    if 0 in heads or len(heads) > 1 or max(heads, default=1) > MAX_HEADS:
        recipe.fail(
            path,
            f"{_row(path)} has strings of {', '.join(map(str, sorted(heads)))} letters. "
            f"Give each one letter per head (at most {MAX_HEADS}), or one letter for all heads.",
        )
    _check_letters(recipe, path, "".join(row))


def _check_steps(recipe: "Recipe", branch: str, pattern: str, row: str) -> None:
    path = ("timeline", branch, pattern)
    steps = recipe.made_for.steps
    if steps is None:
        recipe.fail(
            path, f"{_row(path)} needs to know the number of steps. Add to [made_for]: steps = {len(row)}"
        )
    if len(row) != steps:
        recipe.fail(
            path,
            f"{_row(path)} has {len(row)} letters, but [made_for] steps is {steps}. Give each step one.",
        )
    _check_letters(recipe, path, row)


def _check_weights(recipe: "Recipe") -> None:
    steps = recipe.made_for.steps
    if recipe.weights and len(recipe.fitted_at) != steps:
        recipe.fail(
            ("weights", "levels"),
            f"[weights] levels must give the noise level of each of the {steps} steps of [made_for]; found "
            f"{len(recipe.fitted_at)}. Weights hold for the schedule they were fitted on alone.",
        )
    for branch, rows in recipe.weights.items():
        for pattern, row in rows.items():
            path = ("weights", branch, pattern)
            if branch not in ("cond", "uncond"):
                recipe.fail(
                    path,
                    f"{_row(path)}: weights name the values of both branches, so each branch has its own. "
                    f"Write [weights.cond] and [weights.uncond].",
                )
            timeline = {**recipe.timeline.get("both", {}), **recipe.timeline.get(branch, {})}
            if pattern not in timeline:
                recipe.fail(
                    path,
                    f"{_row(path)} has no row in [timeline.{branch}]; rows there: "
                    f"{nearest(pattern, timeline)}. Weights belong to the letters of a row.",
                )
            for step, weights in row.items():
                _check_sum(recipe, (*path, str(step)), step, weights)


def _check_sum(recipe: "Recipe", path: tuple[str, ...], step: int, weights: Mapping[str, float]) -> None:
    if not step < (recipe.made_for.steps or 0) or not 1 <= len(weights) <= MAX_WEIGHTS:
        recipe.fail(
            path,
            f"{_row(path)}: step {step} must be one of the {recipe.made_for.steps} steps and sum up 1 to "
            f"{MAX_WEIGHTS} values; found {len(weights)}.",
        )
    for name in weights:
        if name.startswith("x") and not path[2].endswith(DENOISER):
            recipe.fail(
                (*path, name),
                f"{_row(path)}: only the whole denoiser's inputs are kept, not those of {path[2]}. Leave "
                f"{shown(name)} out, or fit the site {DENOISER}.",
            )
        if not re.fullmatch("[cux][0-9]{1,5}", name) or int(name[1:]) > step:
            recipe.fail(
                (*path, name),
                f"{_row(path)}: {shown(name)} is no value that step {step} could know. Write c3 (cond at "
                "step 3), u3 (uncond) or x3 (the denoiser's input), of that step or an earlier one.",
            )


def _check_exact(recipe: "Recipe") -> None:
    for key, value in vars(recipe.exact).items():
        if not isinstance(value, bool) and value != AUTO:
            recipe.fail(
                ("exact", key),
                f'[exact] {key} must be "{AUTO}", true or false; found {shown(value)}. '
                f'"{AUTO}" uses it where it pays.',
            )


def _check_files(recipe: "Recipe") -> None:
    for name, digest in recipe.files.items():
        path = ("files", name)
        if not _FILE.fullmatch(name) or len(name) > 200:
            recipe.fail(
                path,
                f"[files] {shown(name)} is not allowed: only .safetensors files beside or below the recipe, "
                'by a plain relative name such as "router.safetensors".',
            )
        if not re.fullmatch("[0-9a-f]{64}", digest):
            recipe.fail(
                path,
                f"[files] {name} must give its sha256, 64 hexadecimal digits; found {shown(digest)}. "
                f"Compute it with: sha256sum {name}",
            )


def _row(path: tuple[str, ...]) -> str:
    return f'[{path[0]}.{path[1]}] "{path[2]}"'
