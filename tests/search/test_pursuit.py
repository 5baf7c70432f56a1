"""A search that is interrupted, short of time or asked wrongly; and the maps that its page shows."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_accel import recipe_files
from dit_accel.errors import BadUsage
from dit_accel.search import maps
from dit_accel.search.ditfastattn.greedy import Decisions
from dit_accel.search.goal import Goal
from dit_accel.search.pursuit import Clock, Pursuit
from dit_accel.search.saved import Saved
from tests.search.conftest import JOBS, decide

LOSSY = 6e-5  # at which the first layer of tiny wan, too, gives an error to those behind it


class Stopped(Exception):
    """What ends a process, as far as a search can tell."""


def interrupted(subject, state, after):
    """Search with a state file and be stopped after some decisions; what the file then holds."""
    kept = Saved(state, subject.asked(), Decisions)
    left = after

    def stop():
        nonlocal left
        kept.save()
        left -= 1
        if left < 0:
            raise Stopped

    with pytest.raises(Stopped):
        decide(subject, LOSSY, saved=stop, decisions=kept.decisions(LOSSY))
    return Saved(state, subject.asked(), Decisions).decisions(LOSSY)


@pytest.mark.parametrize("after", [0, 1, 6], ids=["inside_the_first_step", "between_steps", "inside_a_step"])
def test_an_interrupted_search_ends_with_the_same_recipe(after, tiny, tmp_path):
    subject = tiny("wan").look(jobs=JOBS[:1])
    whole, through = decide(subject, LOSSY)
    found = interrupted(subject, tmp_path / "x.state.json", after)
    assert not found.finished and sum(map(len, found.picks[1:])) == after + 1
    rest, after_all = decide(subject, LOSSY, decisions=found)
    assert rest.to_toml() == whole.to_toml()
    assert after_all.losses == through.losses and after_all.finished


def test_a_finished_search_is_not_run_again(tiny, tmp_path):
    made = tiny("wan")
    subject = made.look(jobs=JOBS[:1])
    recipe, found = decide(subject, 1.0)
    made.model.pipe.transformer.register_forward_pre_hook(_refuse)
    assert decide(subject, 1.0, decisions=found)[0].to_toml() == recipe.to_toml()


def _refuse(*_):
    raise AssertionError("the denoiser was called")


def test_a_budget_leaves_the_rest_full(tiny):
    subject = tiny("wan").look(jobs=JOBS[:1])
    made = 0

    def ended():
        nonlocal made
        made += 1
        return made > 5

    recipe, found = decide(subject, 1.0, ended=ended)
    assert found.picks == ["FF", "RR", "RR", "R"] and not found.finished
    # what the second layer gained at the third step cannot be had: it computes from there on
    assert recipe.timeline["both"] == {"blocks.0.attn1": "CrrrCCCCC", "blocks.1.attn1": "CrrCCCCCC"}


class Silent:
    def generation(self, done, total, what): ...

    def step(self, done, total): ...


def test_a_budget_that_verification_alone_exceeds_is_refused_after_one_step(tiny, tmp_path):
    subject = tiny("wan").look(jobs=JOBS[:1])
    clock = Clock(minutes=1e-3)
    pursuit = Pursuit(subject, Goal("delta", 1.0), tmp_path / "x.json", clock, Silent(), print)
    with pytest.raises(BadUsage, match="to verify the recipe alone takes"):
        pursuit.find()
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(BadUsage, match="within 0 minutes"):
        Clock(minutes=0)


def test_a_state_of_another_search_is_refused(tiny, tmp_path):
    subject = tiny("wan").look(jobs=JOBS[:1])
    state = tmp_path / "x.json"
    Saved(state, subject.asked(), Decisions).save()
    Saved(state, subject.asked(), Decisions)
    other = tiny("wan").look(jobs=JOBS[1:])
    with pytest.raises(BadUsage, match=r"prompts .*blue disc.*x.json is the state of a search with prompts"):
        Saved(state, other.asked(), Decisions)
    with torch.no_grad():
        next(subject.model.pipe.transformer.parameters()).add_(1)
    with pytest.raises(BadUsage, match="asked to search with weights"):
        Saved(state, subject.asked(), Decisions)
    state.write_text("{}")
    with pytest.raises(BadUsage, match="not the state of a search"):
        Saved(state, {}, Decisions)


def test_a_state_file_is_whole_at_every_moment(tmp_path, monkeypatch):
    state = Saved(tmp_path / "x.json", {"model": "tiny"}, Decisions)
    state.decisions(0.1).picks.append("F")
    state.save()
    before = (tmp_path / "x.json").read_text()
    state.decisions(0.1).picks.append("R")
    monkeypatch.setattr(recipe_files.os, "replace", _refuse)
    with pytest.raises(AssertionError):
        state.save()
    assert (tmp_path / "x.json").read_text() == before
    assert json.loads(before)["searches"]["0.1"]["picks"] == ["F"]


@pytest.mark.parametrize(
    ("asked", "look", "words"),
    [
        ({"guidance_scale": 1.0}, {}, "without guidance"),
        ({"num_inference_steps": 8}, {}, "over 8 steps"),
        (
            {},
            {"sites": ["blocks.9.attn1"]},
            'site "blocks.9.attn1"; it has no self-attention here; nearest: blocks',
        ),
        ({}, {"sites": ["blocks.0.attn2"]}, "no self-attention"),
        ({}, {"sites": ["blocks.0.ffn"]}, "no self-attention"),
        ({}, {"full": "fast"}, 'full heads by "fast"; known: model, auto'),
        ({}, {"near": "circle"}, 'near set "circle"; known: band, brick'),
        ({}, {"memory_gb": 1e-6}, "--memory-gb allows 0.0"),
        ({"height": 33}, {}, "refused"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_any_forward(asked, look, words, tiny):
    made = tiny("wan", **asked)
    ran = []
    made.model.pipe.transformer.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(BadUsage, match=words):
        made.look(jobs=JOBS[:1], **look)
    assert not ran


def test_memory_is_foreseen(tiny):
    """What the session holds at most in a search is what was said to be needed."""
    made = tiny("wan")
    subject = made.look(jobs=JOBS)
    peaks = []
    from dit_accel.memory import Memory

    own = Memory.store_heads

    def store(self, *args, **rest):
        own(self, *args, **rest)
        # text keys and values are no decision of the search
        peaks.append(sum(slot.bytes for (at, _), slot in self.slots.items() if at[3][0] != "text"))

    Memory.store_heads = store
    try:
        decide(subject, 1e-5)
    finally:
        Memory.store_heads = own
    foreseen = subject.stored_bytes()
    # and what is shared inside a step, an output of cond for each layer
    assert foreseen * 0.9 <= max(peaks) <= foreseen * 1.25


@pytest.mark.parametrize("case", ["pixart_sigma", "qwen_image"])
def test_maps_are_the_softmax_of_what_attention_sees(case, tiny, monkeypatch):
    made = tiny(case)
    subject = made.look(jobs=JOBS[:1])
    seen = []
    own = F.scaled_dot_product_attention

    tokens, calls = math.prod(subject.grid) + subject.text, 2  # layers; uncond has a shorter text

    def catch(query, key, value, *args, **rest):
        if query.shape[1:3] == (4, tokens) == key.shape[1:3]:
            seen.append((query, key))
        return own(query, key, value, *args, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", catch)
    found = maps.attention_maps(made.model, JOBS[0], made.arguments, subject.levels, (4,), subject.sites)
    assert [(each.step, each.site) for each in found] == [(4, site[12:]) for site in subject.sites]
    assert len(seen) == 9 * calls
    q, k = seen[4 * calls]
    weights = (q[-1].double() @ k[-1].double().transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    text = subject.text
    visual = weights[:, text:, text:]
    rows = torch.linspace(0, visual.shape[1] - 1, min(maps.SIDE, visual.shape[1])).round().long()
    assert np.allclose(found[0].weights.sum(-1), visual[:, rows].sum(-1).numpy(), atol=1e-5)
    distance = (torch.arange(visual.shape[1])[:, None] - torch.arange(visual.shape[1])[None]).abs()
    near = (visual * (distance <= visual.shape[1] // 8))[:, rows].sum(-1).mean(-1)
    assert np.allclose(found[0].near, (near / visual[:, rows].sum(-1).mean(-1)).numpy(), atol=1e-5)


def test_decisions_come_back_as_they_were(tmp_path):
    state = Saved(tmp_path / "x.json", {}, Decisions)
    state.searches["0.1"] = Decisions(
        ["FF", "RW"], [[{}, {}], [{"R": 1e-7}, {"R": 0.1, "W": 3e-9}]], ["t", "t"]
    )
    state.save()
    assert Saved(tmp_path / "x.json", {}, Decisions).searches == state.searches
