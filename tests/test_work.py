"""The share of the self-attention that a run computed, against what its recipe leaves out."""

import itertools
import math

import pytest

from dit_accel import api
from dit_accel.block_heads import Near
from dit_accel.bricks import best_brick, lay_bricks
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.methods.reuse.reuse import Reuse
from dit_accel.recipe import Recipe
from dit_accel.sites import Denoiser
from dit_accel.testing import TINY
from dit_accel.work import Work
from dit_accel_kernels.block_attention import break_even

STEPS = 12
SITES = {"wan": "blocks.*.attn1", "pixart_sigma": "transformer_blocks.*.attn1"}
CALLS = {
    "wan": {"prompt": "a", "height": 32, "width": 48, "num_frames": 13, "guidance_scale": 4.0},
    "pixart_sigma": {
        "prompt": "a", "height": 512, "width": 256, "guidance_scale": 4.0, "use_resolution_binning": False
    },
}  # fmt: skip
GRIDS = {"wan": (4, 2, 3), "pixart_sigma": (1, 32, 16)}
NEAR = {"wan": (0, 1, 1), "pixart_sigma": (0, 4, 4)}


@pytest.fixture(autouse=True)
def no_processor_decides(monkeypatch):
    """Whether near heads are worth it is up to a machine's break-even densities; what they compute is not."""
    monkeypatch.setattr(break_even, "density", lambda *given: None)


def kept(case, **tables):
    """What the report of one run says."""
    pipe = TINY[case].build(complete=True, layers=2)
    recipe = Recipe.from_dict({"schema": 1, "made_for": {"steps": STEPS}, **tables})
    with api.accelerated(pipe, recipe) as handle:
        pipe(num_inference_steps=STEPS, output_type="latent", **CALLS[case])
        assert f"{handle.report().attention_kept:.1%}" in str(handle.report())
        return handle.report().attention_kept


@pytest.mark.parametrize(("grid", "text"), [((5, 7, 9), 0), ((1, 20, 13), 11), ((3, 16, 18), 130)])
def test_density_counts_pairs_of_tokens_as_a_loop_does(grid, text):
    for near in (Near(extent=(0, 1, 0)), Near(radius=(1, 2, 3)), Near(extent=(0, 0, 0), brick=(1, 4, 5))):
        layout = lay_bricks(grid, text, near.brick_on(grid))
        starts = layout.starts.tolist()
        blocks = layout.within_tokens(near.radius) if near.radius else layout.within_bricks(near.extent)
        sizes = [b - a for a, b in itertools.pairwise(starts)]
        pairs = sum(sizes[i] * sizes[j] for i, j in blocks.nonzero().tolist())
        assert near.density(grid, text) == pytest.approx(pairs / (math.prod(grid) + text) ** 2)
    assert Near(extent=(9, 9, 9)).density(grid, text) == 1.0
    assert best_brick(grid) != (1, 4, 5)


def test_a_coreset_computes_its_rows_times_its_keys_and_exact_text():
    grid, text = (4, 6, 6), 10  # twelve buckets of 2 x 3 x 2, of which six tokens stay
    total = 144 + text
    assert Coreset().work(grid, text) == pytest.approx((144 * (72 + text) + text * total) / total**2)
    both = Coreset(queries="selected", keys="as_queries")
    assert both.work(grid, text) == pytest.approx((72 * (72 + text) + text * total) / total**2)


@pytest.mark.parametrize("case", SITES)
def test_heads_near_and_reused_and_modules_skipped_are_left_out(case):
    site = SITES[case]
    density = Near(extent=NEAR[case], brick=(1, 1, 1) if case == "wan" else (1, 4, 4)).density(GRIDS[case])
    assert 0.05 < density < 0.95
    choices = {
        "F": {"method": "full"},
        "b": {"method": "brick", "extent": NEAR[case], "brick": (1, 1, 1) if case == "wan" else (1, 4, 4)},
        "r": {"method": "reuse", "max_age": 4},
        "C": {"method": "compute"},
    }
    rows = {"noise": {"edges": [1.0, 0.0]}, "choices": choices}
    heads = {"attention": {"both": {site: ["FbbF"]}}}
    assert kept(case, **rows, **heads) == pytest.approx((2 + 2 * density) / 4)
    # modules: two of twelve steps of one of the two layers
    skipped = {"timeline": {"both": {site.replace("*", "1"): "CCCrCrCCCCCC"}}}
    assert kept(case, **rows, **skipped) == pytest.approx(1 - 2 / 24)
    assert kept(case, **rows, **heads, **skipped) == pytest.approx((2 + 2 * density) / 4 * (1 - 2 / 24))


@pytest.mark.parametrize("case", SITES)
def test_a_span_of_blocks_that_is_reused_computes_no_attention(case):
    blocks = SITES[case].partition(".")[0]
    choices = {"C": {"method": "compute"}, "r": {"method": "reuse", "max_age": 4, "gates": "stored"}}
    tables = {"choices": choices, "timeline": {"both": {f"{blocks}.0-1": "CCCrCrrCCCCC"}}}
    assert kept(case, **tables) == pytest.approx(9 / 12)
    one = {"choices": choices, "timeline": {"cond": {f"{blocks}.1": "CCCrCrrCCCCC"}}}
    assert kept(case, **one) == pytest.approx(1 - 3 / 48)


def test_without_a_plan_everything_is_computed():
    assert kept("wan") == 1.0


def test_forwards_that_ran_without_the_session_count_as_full():
    key, heads = ("transformer", "blocks.0.attn1"), 2
    work = Work()
    for active in (True, True, True, False):
        work.forward("transformer", "both", active)
    for _ in range(3):
        work.attend(key, "both", {None: 1, Reuse(2): 1}, ((1, 4, 4), 0))
    denoisers = {"transformer": Denoiser("transformer", {key[1]: heads}, {}, ("blocks.0",))}
    assert work.kept(denoisers, {}) == pytest.approx((3 * 0.5 + 1) / 4)
    assert Work().kept(denoisers, {}) is None
