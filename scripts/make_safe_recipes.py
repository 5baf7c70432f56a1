"""Write recipes/<model>/safe.toml for every real model we know, by rule.

python scripts/make_safe_recipes.py
"""

from pathlib import Path

from dit_accel.search.safe.real_models import MODELS
from dit_accel.search.safe.rule import safe_recipe

if __name__ == "__main__":
    for model in MODELS:
        recipe = safe_recipe(model)
        print(recipe.save(Path(__file__).parent.parent / "recipes" / f"{recipe.name}.toml"))
