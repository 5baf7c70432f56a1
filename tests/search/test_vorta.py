"""VORTA: what training runs is what a recipe runs; the loss is the paper's; a table becomes a recipe."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_accel import api
from dit_accel.errors import BadUsage, Slower
from dit_accel.generate import call_arguments
from dit_accel.loading import Place, load
from dit_accel.methods.attention.brick import Brick
from dit_accel.methods.attention.coreset import Coreset
from dit_accel.prompts import jobs
from dit_accel.recipe_names import resolve_model
from dit_accel.search.subject import call_of
from dit_accel.search.vorta import routing as vorta
from dit_accel.search.vorta.routing import Routing, Settings, settings_of
from dit_accel.search.vorta.table import letters_of
from dit_accel.train.vorta import samples as made
from dit_accel.train.vorta.branches import LETTERS
from dit_accel.train.vorta.objective import Objective, Weights, draw, embeddings, measure_costs, seconds_on
from dit_accel.train.vorta.router import Routers
from tests.search.conftest import JOBS, never

ALL = ("pixart_sigma", "wan", "cogvideox", "qwen_image")
# ---- on models


def subject_of(tiny, case, folder, jobs=JOBS, **settings):
    """A subject with its samples made."""
    model = tiny(case, steps=4)
    subject = Routing(model.model, jobs, model.arguments, Settings(**settings), folder)
    subject.prepare(lambda *_: None)
    return subject


def certain(subject, letter):
    """Routers that choose one branch whatever the time is."""
    routers = Routers(subject.sites, subject._width())
    for linear, heads in zip(routers.linears, subject.sites.values(), strict=True):
        torch.nn.init.zeros_(linear.weight)
        bias = torch.zeros(heads, 3)
        bias[:, LETTERS.index(letter)] = 1000.0
        linear.bias.data = bias.flatten()
    return routers


def outputs_of_a_run(subject, recipe):
    """What the denoiser gave out at the first step under a recipe, one for each branch, cond first."""
    seen = []
    pipe = subject.model.pipe
    with api.accelerated(pipe, recipe, strict=True):
        hook = pipe.transformer.register_forward_hook(
            lambda module, args, output: seen.append(
                output[0] if isinstance(output, tuple) else output.sample
            )
        )
        pipe(**call_of(subject.jobs[:1], subject.arguments), output_type="latent")
        hook.remove()
    if subject.family.guidance == "batched":
        return list(reversed(seen[0].chunk(2)))
    return seen[:2]


@pytest.mark.parametrize("case", ALL)
def test_certain_routers_train_what_their_recipe_runs(case, tiny, tmp_path):
    subject = subject_of(tiny, case, tmp_path)
    found = {}
    for letter in LETTERS:
        routers = certain(subject, letter)
        recipe = subject.recipe(subject.table(routers), None)
        wanted = outputs_of_a_run(subject, recipe)
        objective = objective_of(subject)
        with subject.routed.attached(), torch.no_grad():
            for branch, output in zip(subject.samples[0].branches, wanted, strict=True):
                mixed, scores = objective._mixed(routers, branch, 1.0)
                assert all(each[..., LETTERS.index(letter)].eq(1).all() for each in scores.values())
                torch.testing.assert_close(mixed, output, rtol=1e-3, atol=1e-4)
        found[letter] = wanted[0]
    assert not torch.allclose(found["F"], found["c"], atol=1e-4)
    if case == "pixart_sigma":  # the other grids are one block
        assert not torch.allclose(found["F"], found["t"], atol=1e-4)


def objective_of(subject, weights=None, costs=(1.0, 0.5, 0.25), steps=10):
    return Objective(
        subject.routed, subject.samples, subject.schedule, subject.branches, weights or Weights(), costs,
        steps=steps, accumulate=2, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("case", ALL)
def test_only_routers_learn_and_all_of_them(case, tiny, tmp_path):
    subject = subject_of(tiny, case, tmp_path, jobs=JOBS[:1])
    module = subject.model.pipe.transformer.requires_grad_(True)
    before = [module.get_submodule(site).processor for site in subject.sites]
    routers = Routers(subject.sites, subject._width())
    with subject.routed.attached():
        objective_of(subject).loss(routers, 1)[0].backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    assert all(linear.weight.grad.abs().sum() > 0 for linear in routers.linears)
    assert [module.get_submodule(site).processor for site in subject.sites] == before
    assert not any("_dit_accel_key" in vars(module.get_submodule(site)) for site in subject.sites)


@pytest.mark.parametrize("case", ALL)
def test_recomputed_blocks_give_the_same_gradients(case, tiny, tmp_path, monkeypatch):
    subject = subject_of(tiny, case, tmp_path, jobs=JOBS[:1])
    calls, kept = [], torch.utils.checkpoint.checkpoint

    def counted(*arguments, **named):
        calls.append(1)
        return kept(*arguments, **named)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    gradients = []
    for wanted in (False, True):
        routers = Routers(subject.sites, subject._width())
        with subject.routed.attached(), subject.routed.recomputed(wanted):
            torch.manual_seed(0)
            objective_of(subject).loss(routers, 1)[0].backward()
        assert bool(calls) is wanted
        gradients.append([linear.weight.grad for linear in routers.linears])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert not subject.model.pipe.transformer.is_gradient_checkpointing


@pytest.mark.parametrize("case", ALL)
def test_routers_see_the_time_and_nothing_else(case, tiny, tmp_path):
    subject = subject_of(tiny, case, tmp_path)
    embedded = embeddings(subject.routed, subject.samples[0], subject.schedule)
    config = subject.model.pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim  # that of the modulated stream
    assert embedded.shape == (4, config.time_embed_dim if case == "cogvideox" else width)
    assert torch.equal(embedded, embeddings(subject.routed, subject.samples[1], subject.schedule))
    assert (embedded[1:] - embedded[:-1]).abs().amax(1).min() > 0
    # and at a time it is what a run embeds at this time
    seen = []
    embedder = subject.model.pipe.transformer.get_submodule(subject.family.time_embedder)
    hook = embedder.register_forward_hook(lambda module, args, output: seen.append(output[:1]))
    pipe = subject.model.pipe
    pipe(**call_of(subject.jobs[:1], subject.arguments), output_type="latent")
    hook.remove()
    calls = len(seen) // 4
    torch.testing.assert_close(torch.cat(seen[::calls]), embedded)


def test_the_loss_is_that_of_the_paper(tiny, tmp_path):
    subject = subject_of(tiny, "wan", tmp_path)
    routers = Routers(subject.sites, subject._width(), seed=1)
    draws = [draw(number, 2, subject.samples, 0) for number in range(400)]
    fifths = np.array([int(each.time * 5) for each in draws])
    assert (fifths[::2] == fifths[1::2]).all() and set(fifths) == set(range(5))
    assert [each.least_noisy for each in draws] == (fifths == 0).tolist()
    assert {each.sample for each in draws} == {each.branch for each in draws} == {0, 1}
    times = np.array([each.time * 5 % 1 for each in draws])
    assert times.min() < 0.05 and times.max() > 0.95 and abs(times.mean() - 0.5) < 0.05

    plain, priced = objective_of(subject), objective_of(subject, Weights(priced="latency"))
    low, high = (int(np.flatnonzero((fifths == 0) == is_low)[0]) for is_low in (True, False))
    with subject.routed.attached(), torch.no_grad():
        for number in (low, high):
            torch.manual_seed(number)
            loss, numbers = plain.loss(routers, number)
            scores = routers(subject.routed.embedding(plain._noisy(subject.samples[0], draws[number])[0]))
            wanted = sum(each[..., 0].square().mean() for each in scores.values())
            assert numbers["price"] == pytest.approx(wanted.item(), rel=1e-5)
            by_hand = 0.02 * numbers["price"] + (
                40 * numbers["distil"] if number == low else numbers["flow"] + 20 * numbers["distil"]
            )
            assert loss.item() == pytest.approx(by_hand, rel=1e-5)
            torch.manual_seed(number)
            _, numbers = priced.loss(routers, number)
            wanted = sum(
                (each[..., 0] + 0.5 * each[..., 1] + 0.25 * each[..., 2]).mean() for each in scores.values()
            )
            assert numbers["price"] == pytest.approx(wanted.item(), rel=1e-5)


def test_what_the_model_should_answer_is_flow_or_what_it_predicts(tiny, tmp_path):
    """The distance to noise - x0 by hand, on the model's own output."""
    subject = subject_of(tiny, "wan", tmp_path)
    objective = objective_of(subject)
    with subject.routed.attached(), torch.no_grad():
        number = next(n for n in range(99) if not draw(n, 2, subject.samples, 0).least_noisy)
        drawn = draw(number, 2, subject.samples, 0)
        torch.manual_seed(5)
        _, numbers = objective.loss(certain(subject, "F"), number)
        torch.manual_seed(5)
        clean = subject.samples[drawn.sample].clean
        noise = torch.randn(clean.shape)
        given = dict(subject.samples[drawn.sample].branches[drawn.branch])
        given["hidden_states"] = (1 - drawn.time) * clean + drawn.time * noise
        given["timestep"] = torch.full_like(given["timestep"], drawn.time * 1000)
        output = subject.model.pipe.transformer(**given)[0]
    assert numbers["flow"] == pytest.approx((output - (noise - clean)).square().mean().item(), rel=1e-4)
    assert numbers["distil"] == pytest.approx(0.0, abs=1e-9)


def test_the_softmax_hardens_to_the_temperature_asked_for(tiny, tmp_path):
    subject = subject_of(tiny, "wan", tmp_path, jobs=JOBS[:1])
    objective = objective_of(subject, Weights(temperature=0.25), steps=5)
    assert [objective.temperature(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.25])
    routers = Routers(subject.sites, subject._width())
    embedded = torch.randn(1, subject._width())
    soft, hard = routers(embedded), routers(embedded, 0.25)
    for site, scores in soft.items():
        assert torch.allclose(scores.pow(4) / scores.pow(4).sum(-1, keepdim=True), hard[site], atol=1e-5)


def test_costs_are_those_of_the_kernels_and_dense_where_it_runs_dense(tiny, tmp_path, monkeypatch):
    subject = subject_of(tiny, "pixart_sigma", tmp_path, jobs=JOBS[:1])
    clock, order = [0.0], []

    def tick(seconds, name):
        def attend(self, visit):
            clock[0] += seconds
            order.append((name, visit.brick))
            return visit.q

        return attend

    def slower(self, visit):
        raise Slower("too much is kept")

    monkeypatch.setattr("dit_accel.train.vorta.objective.seconds_on", lambda device: clock[0])
    monkeypatch.setattr("dit_accel.methods.attention.full.Full.attend", tick(4.0, "full"))
    monkeypatch.setattr(Coreset, "attend", tick(1.0, "coreset"))
    monkeypatch.setattr(Brick, "attend", slower)
    with subject.routed.attached():
        assert measure_costs(subject.routed, subject.samples[0], subject.branches) == (1.0, 0.25, 1.0)
    assert order[:4] == [("full", (1, 8, 16)), ("coreset", (1, 8, 16))] * 2


def test_waiting_for_others_costs_nothing_on_a_cpu():
    began = seconds_on(torch.device("cpu"))
    time.sleep(0.3)
    assert seconds_on(torch.device("cpu")) - began < 0.2


# ---- the whole search


def test_a_training_that_was_cut_off_goes_on_to_the_same_routers(tiny, tmp_path, monkeypatch):
    settings = {"steps": 4, "micro_batches": 2}
    straight = subject_of(tiny, "wan", tmp_path / "straight", **settings)
    monkeypatch.setattr(vorta, "measure_costs", lambda *_: (1.0, 0.5, 0.25))
    wanted, done = straight.train(never, lambda *_: None)
    assert done == 4
    first = subject_of(tiny, "wan", tmp_path / "cut", **settings)
    heard = []
    _, done = first.train(lambda: len(heard) == 2, lambda *what: heard.append(what))
    assert done == 2 and heard == [(1, 4), (2, 4)]

    def refuse(model, job, arguments, whole, told):
        assert not whole, "a sample that is there was made again"
        return run(model, job, arguments, whole, told)

    run = made._run
    monkeypatch.setattr(made, "_run", refuse)
    monkeypatch.setattr(vorta, "measure_costs", lambda *_: pytest.fail("costs were measured again"))
    again = subject_of(tiny, "wan", tmp_path / "cut", **settings)
    assert torch.equal(again.samples[1].clean, straight.samples[1].clean)
    found, done = again.train(never, lambda *what: heard.append(what))
    assert done == 4 and heard[2:] == [(3, 4), (4, 4)]
    for ours, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    moved = Routers(again.sites, again._width())
    assert not torch.equal(found.linears[0].weight, moved.linears[0].weight)
    for words, other in (
        (r"price latency; .* is of a training with price published", {"weights": Weights(priced="latency")}),
        (r"coreset keys; .* Give another --out", {"coreset": "keys"}),
        ("full auto", {"full": "auto"}),
    ):
        with pytest.raises(BadUsage, match=words):
            subject_of(tiny, "wan", tmp_path / "cut", **settings | other)


def test_more_steps_of_a_training_are_a_continuation_unless_it_is_annealed(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(vorta, "measure_costs", lambda *_: (1.0, 0.5, 0.25))
    for name, temperature in (("constant", 1.0), ("annealed", 0.5)):
        weights = Weights(temperature=temperature)
        subject_of(tiny, "wan", tmp_path / name, steps=1, jobs=JOBS[:1], weights=weights)
        again = {"steps": 2, "jobs": JOBS[:1], "weights": weights}
        if temperature == 1:
            subject_of(tiny, "wan", tmp_path / name, **again)
        else:
            with pytest.raises(BadUsage, match="temperature"):
                subject_of(tiny, "wan", tmp_path / name, **again)


def test_two_denoisers_and_a_start_image_are_refused(tiny, tmp_path):
    model = tiny("wan")
    model.model.pipe.transformer_2 = model.model.pipe.transformer
    try:
        with pytest.raises(BadUsage, match=r"has two denoisers; .* Use --method ditfastattn"):
            Routing(model.model, JOBS, model.arguments, Settings(), tmp_path)
    finally:
        model.model.pipe.transformer_2 = None
    call = {"hidden_states": torch.zeros(1, 36, 3, 4, 4)}
    with pytest.raises(
        BadUsage, match=r"its denoiser takes \(1, 36, 3, 4, 4\) and the latents are \(1, 16, 3"
    ):
        made._branches(model.model, [call, call], torch.zeros(1, 16, 3, 4, 4))


@pytest.mark.parametrize(("name", "full"), [("wan", 0.887), ("pixart", 0.469), ("qwen_image", 0.921)])
def test_the_routers_beside_a_toy_are_those_its_readme_tells_of(name, full, tmp_path):
    model = load(f"toys/{name}", Place("cpu"))
    folder = Path(resolve_model(f"toys/{name}"))
    settings = settings_of({"coreset": "keys", "full": "auto"})
    routing = Routing(model, jobs(model, None, 1, 1000), call_arguments(model, {}), settings, tmp_path)
    routing.look()
    table = routing.table(routing.load(folder / "vorta" / "routers.safetensors"))
    share = np.mean([letters_of(scores, None).ravel() == 0 for scores in table.values()])
    assert share == pytest.approx(full, abs=2e-3)
