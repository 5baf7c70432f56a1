"""HarmoniCa: the student is what a recipe runs, proxies by brute force, tables become legal recipes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel import api
from dit_accel.errors import BadUsage
from dit_accel.inventory import describe
from dit_accel.plan import resolve
from dit_accel.search.harmonica.prices import Prices
from dit_accel.search.harmonica.pursuit import check_caching_goal
from dit_accel.search.harmonica.table import picks, spent, tau_within
from dit_accel.search.harmonica.training import Settings, Training, settings_of
from dit_accel.search.subject import call_of
from dit_accel.train.harmonica.objective import Objective, Rules, drawn_gates
from dit_accel.train.harmonica.proxy import computing, step_weights
from dit_accel.train.harmonica.router import CERTAIN, LETTERS, Router
from tests.search.conftest import JOBS

STEPS = 9
ROWS = ("CrrCrCrrC", "CCrrrrCrr", "CCPCPPrPC")  # by site, over again


def training_of(tiny, case, tmp_path=None, settings=None, **more):
    model = tiny(case, steps=STEPS, layers=1, **more)
    return Training(model.model, JOBS, model.arguments, settings or Settings(), tmp_path)


def certain(training, letters, choices):
    """A router that does what the rows say, for sure."""
    router = Router(training.sites, STEPS, choices)
    router.table.data.fill_(-1000.0)
    for site in range(len(training.sites)):
        for step, letter in enumerate(letters[site % len(letters)]):
            if choices == 1:
                router.table.data[0, step, site] = 1000.0 if letter == "C" else -1000.0
            else:
                router.table.data[0, step, site, LETTERS.index(letter)] = 1000.0
    return router


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("case", ["pixart_sigma", "wan", "cogvideox", "qwen_image"])
def test_certain_gates_sample_what_their_recipe_samples(case, guided, tiny):
    name = "true_cfg_scale" if case == "qwen_image" else "guidance_scale"
    training = training_of(tiny, case, **{} if guided else {name: 1.0})
    found = []
    for choices, rows in ((1, ROWS[:2]), (3, ROWS[::-1])):
        router = certain(training, rows, choices)
        recipe = training.recipe(router, 0.5)
        pipe = training.model.pipe
        with api.accelerated(pipe, recipe, strict=True):
            wanted = pipe(**call_of(JOBS[:1], training.arguments), output_type="latent")[0]
        gates = drawn_gates(router, 0, 0)
        with training.student.attached(), torch.no_grad():
            own, _ = training.trajectories.latents(router, gates, JOBS[0])
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
        found.append(own)
    assert not torch.equal(*found)


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("case", ["pixart_sigma", "wan", "qwen_image"])
def test_slopes_are_those_of_the_error_and_reach_the_router_alone(case, choices, tiny):
    training = training_of(tiny, case)
    router = Router(training.sites, STEPS, choices, seed=1)
    objective = Objective(training.trajectories, ["a red ring"], Rules(), None)
    objective._weighed = 0
    module = training.model.pipe.transformer
    before = [p.requires_grad for p in module.parameters()]
    with training.student.attached():
        slopes, errors = objective.slopes(router, 0)
        loss, _ = objective.loss(router, 0)
        loss.backward()
    assert (
        set(slopes) == set(range(1, STEPS)) and sum(error > 0 for error in errors.values()) > 3
    )  # else all computed
    assert all(p.grad is None for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()] == before
    assert not any(each._forward_hooks for each in module.modules())
    assert router.table.grad[:, 0].abs().max() == 0 and router.table.grad[:, 1:].ne(0).float().mean() > 0.3
    if choices == 1:  # a gate moved by hand moves the error of its own step as its slope says
        step, site, by = 3, 1, 0.2
        moved = []
        for sign in (1, -1):
            gates = drawn_gates(router, 0, 0)

            def other(at, gates=gates, sign=sign):
                given = gates(at).clone()
                given[0, site] += sign * by * (at == step)
                return given

            heard = {}

            def error(at, own, teacher, heard=heard):
                found = (own - teacher).double().square().mean()
                heard[at] = found.item()
                return found

            with training.student.attached():
                training.trajectories.train(router, other, objective.job(0), error)
            moved.append(heard)
        slope = (moved[0][step] - moved[1][step]) / (2 * by)
        assert slope == pytest.approx(slopes[step][0, site].item(), rel=5e-2)
        assert moved[0][step - 1] == pytest.approx(moved[1][step - 1])


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("kind", ["code", "paper"])
def test_proxies_are_those_of_whole_generations(kind, choices, tiny):
    training = training_of(tiny, "wan")
    router = Router(training.sites, STEPS, choices, seed=2)
    gates = drawn_gates(router, 0, 5)
    with training.student.attached(), torch.no_grad():
        found = step_weights(kind, training.trajectories, router, gates, JOBS[0])

        def run(cached):
            latents, _ = training.trajectories.latents(
                router, lambda at: gates(at) if at in cached else computing(router), JOBS[0]
            )
            return latents

        later = range(1, STEPS)
        if kind == "code":
            all_of = [run(set(range(1, last + 1))) for last in range(STEPS)]
            wanted = [(all_of[i] - all_of[i - 1]).square().mean() for i in later]
        else:
            whole = run(set(later))
            wanted = [(whole - run(set(later) - {i})).square().sum() for i in later]
    assert found[0] == 0 and found[1:].max() > 0
    torch.testing.assert_close(found[1:], torch.stack(wanted), rtol=1e-3, atol=1e-12)


def test_own_decisions_of_branches_are_own_rows(tiny):
    training = training_of(tiny, "pixart_sigma", settings=Settings(branches="own"))
    router = Router(training.sites, STEPS, 1, columns=2)
    router.table.data.fill_(CERTAIN)
    router.table.data[1, 1::2] = -CERTAIN
    recipe = training.recipe(router, 0.5)
    assert set(recipe.timeline) == {"uncond"} or set(recipe.timeline) == {"cond", "uncond"}
    assert recipe.timeline["uncond"][training.sites[0]] == "CrCrCrCrC"
    router.table.data.mul_(1000)
    with api.accelerated(training.model.pipe, recipe, strict=True):
        wanted = training.model.pipe(**call_of(JOBS[:1], training.arguments), output_type="latent")[0]
    with training.student.attached(), torch.no_grad():
        own, _ = training.trajectories.latents(router, drawn_gates(router, 0, 0), JOBS[0])
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_any_table_is_a_legal_recipe_within_its_budget(choices, tiny):
    training = training_of(tiny, "wan")
    rng = np.random.default_rng(3)
    router = Router(training.sites, STEPS, choices)
    router.table.data = torch.from_numpy(rng.normal(size=router.table.shape) * 3).float()
    prices = Prices(10.0, tuple((0.2, 0.01, 0.02) for _ in training.sites), STEPS)
    shares = []
    for speedup in (1.1, 1.4, 1.7):
        costs = prices.costs(max(2, choices), 1, speedup)
        tau = tau_within(router, costs)
        shares.append(spent(router, tau, costs))
        assert shares[-1] <= costs.budget < shares[-1] + 0.05
        assert (picks(router, tau)[:, 0] == 0).all()
        recipe = training.recipe(router, tau)
        assert {x for row in recipe.timeline["both"].values() for x in row} <= set("CrP")
        one = describe("transformer", training.model.pipe.transformer, training.family)
        plan = resolve(recipe, (one,), training.levels)  # a row that breaks a rule raises
        assert plan.approximates and not plan.notes
    assert shares[0] > shares[1] > shares[2]
    with pytest.raises(BadUsage, match=r"--speedup 9; sublayers take 54% .* Ask for less"):
        prices.costs(2, 1, 9.0)


def test_a_family_without_sublayers_two_denoisers_and_few_steps_are_refused(tiny, tmp_path):
    model = tiny("wan", steps=STEPS, layers=1)
    bare = replace(model.model.family, sublayers=(), self_attention=(), cross_attention=())
    with pytest.raises(BadUsage, match=r"names no sublayers that its blocks have"):
        Training(replace(model.model, family=bare), JOBS, model.arguments, Settings(), tmp_path)
    with pytest.raises(BadUsage, match="Give --steps 9 or more"):
        Training(model.model, JOBS, model.arguments | {"num_inference_steps": 4}, Settings(), tmp_path)
    with pytest.raises(BadUsage, match="two denoisers"):
        pipe = model.model.pipe
        pipe.transformer_2 = pipe.transformer
        try:
            Training(model.model, JOBS, model.arguments, Settings(), tmp_path)
        finally:
            pipe.transformer_2 = None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gates": "wild"}, 'gates "wild"; known: published, hard, hard-reuse'),
        ({"proxy": "guess"}, 'the proxy "guess"; known: code, paper'),
        ({"regenerate": 0}, "regenerate every 0 steps"),
        ({"gates": "hard", "beta": 1.0}, "--beta 1 with hard gates"),
        ({"beta": -1.0}, "--beta -1 with published gates"),
        ({"lr": 0.0}, "--lr 0; it must be over 0"),
    ],
)
def test_settings_that_are_none_are_refused(given, words):
    with pytest.raises(BadUsage, match=words):
        settings_of(given)


def test_goals_that_are_none_are_refused():
    for settings, speedup, tau, words in (
        (Settings(), 1.0, None, "it must be over 1"),
        (Settings(), None, 1.5, "a score is from 0 to 1"),
        (Settings(), 1.5, 0.5, "a speedup is reached by tau"),
        (Settings(gates="hard"), None, None, "no --speedup was given"),
    ):
        with pytest.raises(BadUsage, match=words):
            check_caching_goal(settings, speedup, tau, False)
    check_caching_goal(Settings(gates="hard"), None, None, True)
