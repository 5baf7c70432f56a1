"""HarmoniCa's training: interruptions and processes change nothing; the budget, the price, the file."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dit_accel.errors import BadUsage
from dit_accel.train.harmonica.ascent import DualAscent
from dit_accel.train.harmonica.objective import Costs, Objective, Rules, first_price
from dit_accel.train.harmonica.router import CERTAIN, Router, certainty, load_router, save_router
from tests.train.test_loop import launch, log_of

WORKER = Path(__file__).with_name("harmonica_worker.py")
spec = importlib.util.spec_from_file_location("harmonica_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.mark.parametrize("choices", [1, 3])
def test_an_interrupted_training_ends_with_the_same_router(choices, tmp_path):
    straight = worker.trained(tmp_path / "straight", 3, choices)
    worker.trained(tmp_path / "cut", 3, choices, ended=lambda: True)
    assert len(log_of(tmp_path / "cut")) == 1
    found = worker.trained(tmp_path / "cut", 3, choices)
    for name, value in straight.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name], value), name
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "straight")
    fresh = Router(worker.SITES, worker.STEPS, choices)
    assert not torch.equal(found.table[:, 1:], fresh.table[:, 1:])
    assert torch.equal(found.table[:, 0], fresh.table[:, 0])  # the first step computes, whatever is learned
    assert found.weights[0] == 0 and (found.weights[1:] > 0).all()


def test_two_processes_learn_what_one_learns(tmp_path, monkeypatch):
    worker.trained(tmp_path / "one", 2)
    monkeypatch.setattr("tests.train.test_loop.WORKER", WORKER)
    code, said = launch([tmp_path / "two", 2], ranks=2)
    assert code == 0, said
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5)


def descend(start, rate, steps=90):
    """Two sites; the error wants both to compute, the second one four times less: (spent by step, router)."""
    router = Router(("a", "b"), 5, 2)
    router.log_price.data.fill_(start)
    costs = Costs(torch.tensor([[1.0, 0.0], [1.0, 0.0]]) / 10, 0.6)  # the first step, and half of the rest
    optimizer = DualAscent(router.named_parameters(), 0.2, rate=rate)
    objective = Objective(None, ["x"], Rules(), costs)
    spent = []
    for _ in range(steps):
        scores = router.scores()
        loss, told = objective._price(router, scores)
        (loss + 0.01 * (scores[:, 1:, :, 1] * torch.tensor([4.0, 1.0])).sum()).backward()
        optimizer.step()
        router.zero_grad()
        spent.append(told["spent"])
    return spent, router


def test_dual_ascent_meets_the_budget():
    spent, router = descend(start=-0.8, rate=1.0)  # a price at which nothing is worth it
    assert min(spent) < 0.55 and spent[-1] == pytest.approx(0.6, abs=0.03)
    sure = certainty(router)[0, 1:]
    assert (sure[:, 0] > 0.5).all() and (sure[:, 1] < 0.5).all()
    assert router.table.abs().max() <= CERTAIN
    assert (router.table[:, 0, :, 0] == CERTAIN).all()  # the first step is in the budget, but does not learn
    without, _ = descend(start=-0.8, rate=0.0)
    assert without[-1] < 0.3


def test_a_first_price_pays_for_a_share_of_the_worth():
    router = Router(("a", "b"), 3)
    slopes = {1: torch.tensor([[-4.0, -1.0]]), 2: torch.tensor([[-3.0, 0.5]])}
    ones = torch.ones(2)
    assert first_price(router, slopes, ones, 0.5) == 1.0  # at it two of four are worth more
    assert first_price(router, slopes, ones, 0.25) == 3.0
    assert first_price(router, slopes, torch.tensor([10.0, 1.0]), 0.0) == 1.0  # per cost
    hard = Router(("a", "b"), 3, 3)
    slopes = {1: torch.tensor([[[-4.0, 0.0, -1.0], [-1.0, 0.0, 0.0]]])}
    assert first_price(hard, slopes, ones, 0.0) == 3.0  # over the better of reuse and forecast


def test_a_file_is_that_router_and_no_other(tmp_path):
    router, told = Router(("a", "b"), 3, 3, columns=2), {"gates": "hard"}
    router.table.data.normal_()
    save_router(tmp_path / "r.safetensors", router, told)
    found = load_router(tmp_path / "r.safetensors", ("a", "b"), 3, told)
    assert torch.allclose(found.table, router.table, atol=1e-2) and found.columns == 2
    for words, sites, steps, other in (
        ("sites", ("a", "c"), 3, told),
        ("with steps 4; it was trained with steps 3", ("a", "b"), 4, told),
        ("gates published; it was trained with gates hard", ("a", "b"), 3, {"gates": "published"}),
    ):
        with pytest.raises(BadUsage, match=words):
            load_router(tmp_path / "r.safetensors", sites, steps, other)
    (tmp_path / "bad.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(BadUsage, match="cannot be read as safetensors"):
        load_router(tmp_path / "bad.safetensors", ("a",), 3, told)
