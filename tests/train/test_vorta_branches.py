"""VORTA's branches in training: the numbers of the methods, and right gradients; noise; routers' files."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from dit_accel.bricks import lay_bricks
from dit_accel.errors import BadUsage
from dit_accel.methods.attention.brick import Brick
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.testing import far_from_zero
from dit_accel.train.vorta.branches import branches_of, mix, near, reduced
from dit_accel.train.vorta.router import Routers, load_routers, save_routers
from dit_accel.train.vorta.samples import noised
from dit_accel.visit import AttentionVisit
from dit_accel_kernels.block_attention import break_even

BRANCHES = branches_of("published", False)
SCALE = 0.3
GRIDS = [(5, 9, 11), (1, 17, 23), (2, 6, 4)]  # ragged blocks and buckets, an image, a single block


@pytest.fixture(autouse=True)
def no_processor_decides(monkeypatch):
    """Whether a method runs dense is up to a machine's break-even densities; what it computes is not."""
    monkeypatch.setattr(break_even, "density", lambda *given: None)


def make_visit(grid, num_text, text_first, hidden=False, dtype=torch.float32):
    """Two samples and two heads; `hidden`: one sample cannot see every third key."""
    visual = math.prod(grid)
    total = visual + num_text
    q, k, v = (x.to(dtype) for x in far_from_zero(3, 2, total, 2, 32))
    mask = torch.ones(2, 1, 1, total, dtype=torch.bool)
    mask[1, ..., ::3] = not hidden

    def dense(q, k, v, mask):
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    rows = slice(0, num_text) if text_first else slice(visual, total)
    call = SimpleNamespace(
        brick=None, checked_grid=lambda: grid, num_text=num_text, text_first=text_first, dense=dense,
        text_rows=lambda _: rows, key=("transformer", "here"),
        session=SimpleNamespace(note_once=lambda *_: None),
    )  # fmt: skip
    return AttentionVisit(q, k, v, mask if hidden else None, SCALE, (0, 1), call)  # pyright: ignore


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(("num_text", "text_first"), [(0, True), (7, True), (7, False)])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_differentiated_is_what_runs(grid, num_text, text_first, hidden):
    visit = make_visit(grid, num_text, text_first, hidden)
    methods = [Brick(extent=(1, 0, 1)), Brick(extent=(0, 0, 0), brick=(1, 4, 4))]
    methods += [branches_of(name, joint).coreset for name in ("published", "keys") for joint in (True, False)]
    for method in methods:
        found = near(visit, method.near) if isinstance(method, Brick) else reduced(visit, method)
        torch.testing.assert_close(found, method.attend(visit), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text_first", [True, False])
def test_gradients_of_a_tile_are_those_of_a_masked_softmax(text_first):
    grid, text, brick = (5, 9, 11), 7, (4, 4, 8)
    visit = make_visit(grid, text, text_first, dtype=torch.float64)
    for x in (visit.q, visit.k, visit.v):
        x.requires_grad_(True)
    layout = lay_bricks(grid, text, brick)
    block = torch.bucketize(torch.arange(math.prod(grid) + text), layout.starts[1:].long(), right=True)
    order = layout.permutation(text_first)
    seen = torch.empty(len(order), len(order), dtype=torch.bool)
    seen[order[:, None], order[None]] = layout.within_bricks((1, 0, 0))[block][:, block]
    assert 0.1 < seen.double().mean() < 0.9
    wanted = visit.call.dense(visit.q, visit.k, visit.v, seen)
    found = near(visit, Brick(extent=(1, 0, 0), brick=brick).near)
    torch.testing.assert_close(found, wanted)
    direction = torch.randn_like(wanted)
    inputs = (visit.q, visit.k, visit.v)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(wanted, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_coreset_has_gradients_through_what_is_kept():
    visit = make_visit((2, 3, 2), 0, True, dtype=torch.float64)
    for x in (visit.q, visit.k, visit.v):
        x.requires_grad_(True)
    method = Coreset(queries="selected", keys="as_queries", reweight=False)
    gradient = torch.autograd.grad(reduced(visit, method).sum(), visit.v)[0]
    # every row of a bucket of 12 is a mean of the 6 values kept: the weights of 12 rows sum to 12
    torch.testing.assert_close(gradient.sum(1), torch.full_like(gradient[:, 0], 12.0))
    assert ((gradient.abs().amax(-1) > 0).sum(1) == 6).all()


@pytest.mark.parametrize("name", ["published", "keys"])
def test_gradients_of_a_coreset_are_its_slopes(name):
    visit = make_visit((3, 3, 5), 2, False, dtype=torch.float64)
    small = [x[:1, :, :1, :4].clone().requires_grad_(True) for x in (visit.q, visit.k, visit.v)]
    method = branches_of(name, True).coreset

    def output(q, k, v):
        return reduced(replace(visit, q=q, k=k, v=v), method)

    assert torch.autograd.gradcheck(output, small)


def test_a_mixture_is_weighed_head_by_head():
    visit = make_visit((5, 9, 11), 0, True)
    branches = branches_of("published", False)
    scores = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]])
    found = mix(visit, branches, scores)
    full, core, tile = (method.attend(visit) for method in branches.methods)
    torch.testing.assert_close(found[0, :, 0], core[0, :, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :, 0], full[1, :, 0])
    wanted = 0.5 * full[0, :, 1] + 0.25 * core[0, :, 1] + 0.25 * tile[0, :, 1]
    torch.testing.assert_close(found[0, :, 1], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :, 1], tile[1, :, 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("time", [0.0, 0.4217, 0.9999])
def test_noise_is_added_as_schedulers_do(kind, time):
    clean, noise = torch.randn(2, 1, 4, 8, 8)
    scheduler = DDPMScheduler(prediction_type=kind)
    noisy, timestep, answer = noised(scheduler, clean, noise, time)
    step = torch.tensor([int(timestep)])
    torch.testing.assert_close(noisy, scheduler.add_noise(clean, noise, step))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, step)}
    torch.testing.assert_close(answer, wanted[kind])
    flow = FlowMatchEulerDiscreteScheduler()
    noisy, timestep, answer = noised(flow, clean, noise, time)
    assert timestep == time * 1000
    torch.testing.assert_close(noisy - time * answer, clean)
    torch.testing.assert_close(noisy + (1 - time) * answer, noise)


def test_routers_come_back_from_their_file(tmp_path):
    routers = Routers({"blocks.0.attn1": 2, "blocks.1.attn1": 2}, 8, seed=4)
    told = {"family": "wan", "choices": BRANCHES.choices()}
    file = tmp_path / "deep" / "routers.safetensors"
    save_routers(file, routers, told)
    again = load_routers(file, routers.sites, 8, told)
    x = torch.randn(1, 8)
    for site, scores in routers(x).items():
        assert torch.allclose(again(x)[site], scores, atol=1e-3)
    with pytest.raises(BadUsage, match=r"2 of its tensors do not fit: blocks.1.attn1.bias is absent there"):
        load_routers(file_of_one_layer(tmp_path), routers.sites, 8, told)
    with pytest.raises(BadUsage, match=r"blocks.0.attn1.bias is \(6,\) there and \(9,\) for this model"):
        load_routers(file, dict.fromkeys(routers.sites, 3), 8, told)
    with pytest.raises(BadUsage, match=r"with choices .* they were trained with .* Ask for that"):
        load_routers(file, routers.sites, 8, told | {"choices": branches_of("keys", False).choices()})
    (tmp_path / "not").write_bytes(b"anything")
    with pytest.raises(BadUsage, match="cannot be read as safetensors"):
        load_routers(tmp_path / "not", routers.sites, 8, told)


def file_of_one_layer(folder):
    file = folder / "first.safetensors"
    save_routers(file, Routers({"blocks.0.attn1": 2}, 8), {"family": "wan"})
    return file
