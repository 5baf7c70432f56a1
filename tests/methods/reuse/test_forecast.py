"""Forecasts: exact on polynomials in the noise level, in the weights alone and through a real denoiser."""

import pytest
import torch
from torch import Tensor, nn

import dit_accel
from dit_accel.extrapolation import weights
from dit_accel.methods.reuse.forecast import Forecast
from dit_accel.methods.reuse.share_branch import ShareBranch
from dit_accel.recipe import Recipe
from dit_accel.testing import TINY

NODES = (0.31, 0.52, 0.9, 0.97)  # newest first, unevenly spaced
STEPS = 12


@pytest.mark.parametrize("order", range(4))
def test_lagrange_is_exact_on_polynomials_of_its_order_and_not_above(order: int):
    found = weights("lagrange", 0.2, NODES[: order + 1])
    for degree in range(order + 2):
        reached = sum(w * (7 + node**degree) for w, node in zip(found, NODES, strict=False))
        assert (abs(reached - (7 + 0.2**degree)) < 1e-9) == (degree <= order)


@pytest.mark.parametrize("order", range(3))
def test_taylor_is_exact_to_degree_one(order: int):
    found = weights("taylor", 0.2, NODES[: order + 1])
    assert sum(found) == pytest.approx(1)
    if order:
        assert sum(w * node for w, node in zip(found, NODES, strict=False)) == pytest.approx(0.2)
    if order == 1:
        assert found == pytest.approx(weights("lagrange", 0.2, NODES[:2]))


def test_taylor_of_order_two_is_a_divided_difference_expansion():
    a, b, c = NODES[:3]
    values = [2.0, -1.0, 5.0]
    first = (values[0] - values[1]) / (a - b)
    second = (first - (values[1] - values[2]) / (b - c)) / (a - c)
    expected = values[0] + (0.2 - a) * first + (0.2 - a) ** 2 * second
    assert sum(
        w * v for w, v in zip(weights("taylor", 0.2, NODES[:3]), values, strict=True)
    ) == pytest.approx(expected)


def test_nodes_of_one_level_count_once():
    assert weights("lagrange", 0.1, (0.3, 0.3, 0.5)) == pytest.approx(
        (weights("lagrange", 0.1, (0.3, 0.5))[0], 0.0, weights("lagrange", 0.1, (0.3, 0.5))[1])
    )


@pytest.mark.parametrize("arguments", [{"order": 5}, {"order": -1}, {"max_age": -1}])
def test_wrong_parameters(arguments: dict[str, int]):
    with pytest.raises(ValueError, match="must be"):
        Forecast(**arguments)


def test_a_copy_has_no_difference_to_continue():
    with pytest.raises(ValueError, match="order"):
        ShareBranch(difference=False, order=1)


class Polynomial(nn.Module):
    """Stands for a feed-forward whose output is a polynomial of the noise level, far from zero."""

    def __init__(self, degree: int, level: list[float], in_place: bool = False):
        super().__init__()
        self.degree, self.level, self.in_place, self.calls = degree, level, in_place, 0
        self.out: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(3)
        terms = [torch.randn(x.shape, generator=generator) * 0.1 + 1 for _ in range(self.degree + 1)]
        value = sum(term * self.level[0] ** power for power, term in enumerate(terms))
        if not self.in_place:
            return value
        self.out = value.clone() if self.out is None else self.out.copy_(value)
        return self.out


def generate(degree: int, order: int | None, in_place: bool = False) -> tuple[Tensor, int]:
    """Latents of a tiny Wan with a polynomial feed-forward, forecast in order or computed; and its calls."""
    pipe, level = TINY["wan"].build(layers=2), [1.0]
    made = Polynomial(degree, level, in_place)
    pipe.transformer.blocks[1].ffn = made
    recipe = Recipe.neutral()
    if order is not None:
        recipe = Recipe.from_text(
            f'schema = 1\n[made_for]\nsteps = {STEPS}\n[choices]\nC = {{ method = "compute" }}\n'
            f'P = {{ method = "forecast", order = {order} }}\n'
            '[timeline.both]\n"blocks.1.ffn" = "CCCCPCPPCCPC"\n'
        )
    with dit_accel.accelerated(pipe, recipe, strict=order is not None) as handle:

        def tell(module: nn.Module, args: object) -> None:
            level[0] = handle.session.tracker.levels[handle.session.at.step]

        hook = pipe.transformer.blocks[0].register_forward_pre_hook(tell)
        latents = TINY["wan"].call(pipe, steps=STEPS)
        hook.remove()
    return latents, made.calls


@pytest.mark.parametrize("order", range(4))
def test_a_denoiser_that_is_a_polynomial_is_forecast_exactly(order: int):
    dense, calls = generate(order, None)
    forecast, fewer = generate(order, order)
    assert (calls, fewer) == (2 * STEPS, 2 * 8)
    torch.testing.assert_close(forecast, dense, atol=2e-4, rtol=1e-4)


def test_one_order_too_few_is_not_exact():
    assert (generate(2, 1)[0] - generate(2, None)[0]).abs().max() > 1e-3


def test_an_output_that_is_overwritten_in_place_corrupts_no_history():
    assert torch.equal(generate(2, 1, in_place=True)[0], generate(2, 1)[0])
