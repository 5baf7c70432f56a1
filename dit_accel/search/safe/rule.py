"""The safe rule: a recipe for a checkpoint nobody has measured yet, cautious on purpose.

The first fifth and the last tenth of the steps compute everything: they fix layout and detail. Between
them every second step saves work, and every step that saves follows one that computed (age 1).

    sequential guidance: of `uncond` only the first and last block run; between them stands cond's residual
        plus the difference that the step before stored. Two residuals are kept, whatever the depth.
    batched guidance: the middle half of the blocks is reused, which keeps the pair of branches one batch. The
        stored outputs are re-gated with the step's own modulation if they fit in 2 GiB, else the span's old
        residual is added, which needs less memory.

Either way about a sixth to a fifth of the blocks' work is left out. A rule measures nothing: the recipes
say so, and a search on the real checkpoint should replace them.
"""

import math
from typing import Any

from dit_accel.recipe import Recipe
from dit_accel.registry import FAMILIES
from dit_accel.search.safe.real_models import RealModel

SMALL_ENOUGH = 2 * 2**30  # bytes, for stored sublayer outputs
GIB = 2**30


def safe_recipe(model: RealModel) -> Recipe:
    """The recipe of the safe rule for one checkpoint."""
    family = FAMILIES.get(model.denoiser)
    if family.guidance == "sequential":
        first, last = 1, model.depth - 2
        letter, choice = "s", {"method": "share_branch", "difference": True, "max_age": 1}
        kept = 2 * model.residual_bytes()
        idea = "uncond is cond plus the stored difference at every second step"
    else:
        first, last = model.depth // 4, model.depth - model.depth // 4 - 1
        letter, choice, kept = "r", *_reuse(model, family, last - first + 1)
        idea = "the middle half of the blocks is reused at every second step"
    return Recipe.from_dict(
        {
            "schema": 1,
            "made_for": {
                "family": family.name, "model": model.model, "steps": model.steps, "grid": model.grid,
                "branches": ["cond", "uncond"] if family.guidance == "sequential" else ["both"],
            },
            "choices": {"C": {"method": "compute"}, letter: choice},
            # twice the prediction at the largest usual size: room for two samples at once
            "limits": {"memory_gb": math.ceil(20 * kept / GIB) / 10},
            "timeline": {"both": {f"{family.blocks[0]}.{first}-{last}": timeline(model.steps, letter)}},
            "made_by": {
                "measured": False,
                "rule": f"safe: {idea}, between the first fifth and the last tenth of the steps",
                "command": "python scripts/make_safe_recipes.py",
                "facts": model.read_from,
            },
        },
        name=f"{model.folder}/safe",
    )  # fmt: skip


def timeline(steps: int, letter: str) -> str:
    """Compute, and `letter` at every second step of the middle."""
    # even, so that the saving steps have odd numbers: mapped to half as many steps some of them remain
    start = 2 * math.ceil(steps / 10)
    end = steps - max(2, math.ceil(steps / 10))
    return "".join(letter if start <= step < end and step % 2 else "C" for step in range(steps))


def _reuse(model: RealModel, family: Any, blocks: int) -> tuple[dict[str, Any], int]:
    """The reuse that fits in memory, and the bytes it keeps for the pair of branches."""
    pair = 2 * model.residual_bytes()
    outputs = pair * blocks * len(family.sublayers)
    if outputs <= SMALL_ENOUGH:
        return {"method": "reuse", "max_age": 1, "gates": "current"}, outputs
    return {"method": "reuse", "max_age": 1, "gates": "stored"}, pair
