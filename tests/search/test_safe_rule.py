"""The safe rule: shipped recipes are its output, fit the real models, and run on tiny ones."""

from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch

from dit_accel import accelerate, plan
from dit_accel.families import family_of
from dit_accel.inventory import describe
from dit_accel.recipe import Recipe
from dit_accel.recipe_names import RECIPES
from dit_accel.search.safe.real_models import MODELS, RealModel
from dit_accel.search.safe.rule import GIB, safe_recipe, timeline
from dit_accel.testing import TINY

BY_FOLDER = {model.folder: model for model in MODELS}
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)


@cache
def denoisers(model: RealModel):
    """The real model's denoisers without memory for their weights."""
    sizes = {
        "num_layers": model.depth,
        "num_attention_heads": model.heads,
        "attention_head_dim": model.head_width,
    }
    extra = {"PixArtTransformer2DModel": {"norm_type": "ada_norm_single"}}.get(model.denoiser, {})
    with torch.device("meta"):
        module = getattr(diffusers, model.denoiser)(**sizes, **extra)
    family = family_of(module)
    assert family is not None
    return tuple(describe(name, module, family) for name in family.denoisers[: model.denoisers])


def saved_share(resolved: plan.Plan, model: RealModel) -> float:
    """The part of all (block, step, branch) visits that is not computed."""
    skipped = sum(
        not entry.computes
        for track in resolved.timeline.values()
        for entries in track.entries.values()
        for entry in entries
    )
    (span,) = {span.blocks for span in resolved.spans.values()}
    return skipped / len(resolved.timeline) * len(span) / (model.depth * 2 * model.steps)


@each_model
def test_the_shipped_recipe_is_what_the_rule_writes(model):
    shipped = RECIPES / model.folder / "safe.toml"
    assert shipped.read_text() == safe_recipe(model).to_toml(), "run: python scripts/make_safe_recipes.py"
    assert Recipe.load(f"{model.folder}/safe") == safe_recipe(model)
    assert safe_recipe(model).made_by["measured"] is False


@each_model
def test_the_recipe_fits_the_real_model_without_a_repair(model):
    levels = tuple(1 - step / model.steps for step in range(model.steps))
    resolved = plan.resolve(safe_recipe(model), denoisers(model), levels)
    assert resolved.notes == ()
    assert len(resolved.timeline) == model.denoisers
    assert all(track.upgraded == 0 for track in resolved.timeline.values())
    assert 0.1 < saved_share(resolved, model) < 0.25


@pytest.mark.parametrize("steps", [10, 20, 25, 30, 40, 50, 51])
def test_the_timeline_computes_at_both_ends_and_never_saves_twice_in_a_row(steps):
    row = timeline(steps, "s")
    assert len(row) == steps
    assert row.count("s") > 0 and "ss" not in row
    assert row.index("s") >= steps / 5
    assert steps - 1 - row.rindex("s") >= max(2, steps / 10)


@each_model
def test_half_as_many_steps_still_save_work(model):
    steps = model.steps // 2
    levels = tuple(1 - step / steps for step in range(steps))
    resolved = plan.resolve(safe_recipe(model), denoisers(model), levels)
    assert saved_share(resolved, replace(model, steps=steps)) > 0.1


@pytest.mark.parametrize(
    ("folder", "case", "method"),
    [
        ("wan2.1-t2v-14b", "wan", "share_branch"),
        ("wan2.2-t2v-a14b", "wan22", "share_branch"),
        ("cogvideox-5b", "cogvideox", "reuse"),
        ("pixart-sigma", "pixart_sigma", "reuse"),
        ("qwen-image", "qwen_image", "share_branch"),
    ],
)
def test_a_tiny_pipeline_runs_under_the_rule_and_skips_what_it_promises(folder, case, method):
    model = replace(BY_FOLDER[folder], depth=8, steps=12, grid=(3, 4, 5))
    recipe = safe_recipe(model)
    pipe = TINY[case].build(layers=model.depth)
    handle = accelerate(pipe, recipe, strict=True)
    latents = TINY[case].call(pipe, steps=model.steps)
    report = handle.report()
    handle.restore()
    assert latents.isfinite().all()
    assert report.counters[method] > 0
    assert 0 < report.memory_bytes <= report.predicted_bytes


@each_model
def test_the_memory_bound_has_room_for_two_samples(model):
    recipe = safe_recipe(model)
    (row,) = recipe.timeline["both"]
    blocks = len(range(*map(int, row.split(".")[1].split("-")))) + 1
    outputs = recipe.choices.get("r") is not None and recipe.choices["r"].parameters["gates"] == "current"
    tensors = 2 * (3 * blocks if outputs else 1)  # two branches; PixArt, the one that fits, has 3 sublayers
    assert recipe.memory_gb is not None
    assert recipe.memory_gb * GIB >= 2 * tensors * model.residual_bytes()
