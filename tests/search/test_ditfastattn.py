"""DiTFastAttn's greedy against a replay in plain PyTorch; its plans run as decided on every family."""

import pytest
import torch

from dit_accel import api
from dit_accel.search.ditfastattn import menu
from dit_accel.search.ditfastattn import search as ditfastattn
from dit_accel.search.subject import call_of
from dit_accel.stages import stages
from tests.search.conftest import JOBS, decide
from tests.search.replay import Replay

ALL = ("pixart_sigma", "wan", "cogvideox", "qwen_image")


def band(case):
    """What the published band keeps at these sizes, by hand: bool [N, N]."""
    if case == "wan":  # 4 frames of 6 tokens: 1/8 of them is less than a frame
        frame = torch.arange(24) // 6
        return frame[:, None] == frame[None]
    block = torch.arange(512) // 128  # 32 rows of 16: 4 rows on each side, in blocks of 8 rows
    return (block[:, None] - block[None]).abs() <= 1


@pytest.mark.parametrize(("case", "delta"), [("pixart_sigma", 2e-5), ("wan", 6e-5)])
def test_decisions_are_those_of_a_replay_by_full_forwards(case, delta, tiny):
    made = tiny(case)
    subject = made.look(jobs=JOBS[:1])
    _, found = decide(subject, delta)
    pipe, blocks = made.model.pipe, made.model.family.blocks[0]
    replay = Replay(pipe, blocks, case == "pixart_sigma", band(case), delta)
    with replay.installed(), stages(pipe):
        pipe(**call_of(subject.jobs, subject.arguments), output_type="latent")
    assert found.picks == replay.decided
    kinds = set("".join(found.picks))
    assert len(kinds) >= 4, f"too easy to tell anything: {kinds}"
    for mine, theirs in zip(found.losses[1:], replay.losses[1:], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.keys() == other.keys()
            assert list(one.values()) == pytest.approx(list(other.values()), rel=0.02, abs=1e-9)


@pytest.mark.parametrize("case", ALL)
def test_the_recipe_runs_as_it_was_decided(case, tiny):
    made = tiny(case)
    subject = made.look(jobs=JOBS[:1])
    recipe, found = decide(subject, 3e-5)
    assert found.finished and len(found.picks) == 9
    joint = "text" in made.model.family.token_order
    with api.accelerated(made.model.pipe, recipe, strict=True) as handle, stages(made.model.pipe):
        made.model.pipe(**call_of(subject.jobs, subject.arguments), output_type="latent")
        report = handle.report()
    counted = report.counters
    letters = [menu.rows_of(found.history("transformer", layer, 9), joint) for layer in range(2)]
    reused = sum(row.cond.count("r") + row.uncond.count("r") for row in letters)
    shared = sum(row.uncond.count("s") + row.heads_uncond.count("h") for row in letters)
    assert reused + shared > 0
    batched = made.model.family.guidance == "batched" and joint  # a pair is answered in one visit
    assert counted.get("reuse", 0) in {reused, reused // 2} if batched else counted.get("reuse", 0) == reused
    if not joint:
        assert counted.get("share_branch", 0) == shared
    assert not [note for note in report.notes if "dense" in note]


def test_a_search_leaves_the_pipeline_as_it_was(tiny):
    made = tiny("wan")
    transformer = made.model.pipe.transformer
    before = {name: module.__dict__.keys() for name, module in transformer.named_modules()}
    decide(made.look(), 1e-4)
    assert {name: module.__dict__.keys() for name, module in transformer.named_modules()} == before
    assert "forward" not in transformer.__dict__


def test_a_search_decides_the_same_every_time(tiny):
    made = tiny("wan")
    subject = made.look(jobs=JOBS[:1])
    first, second = decide(subject, 1e-5), decide(subject, 1e-5)
    assert first[1].picks == second[1].picks and first[1].losses == second[1].losses
    assert first[0].to_toml() == second[0].to_toml()


def test_what_was_not_searched_stays_full(tiny):
    made = tiny("wan")
    subject = made.look(sites=["blocks.1.attn1"])
    recipe, found = decide(subject, 1.0)
    assert found.picks == ["F"] + ["R"] * 8
    sites = {site for table in recipe.timeline.values() for site in table}
    assert sites == {"blocks.1.attn1"}


def test_two_denoisers_each_begin_full(tiny):
    from dit_accel.loading import Model
    from dit_accel.testing import TINY

    made = tiny("wan")
    pipe = TINY["wan22"].build(layers=2)
    for name in ("vae", "text_encoder", "tokenizer"):
        pipe.register_modules(**{name: getattr(made.model.pipe, name)})
    model = Model("tiny", pipe, made.model.family, {}, True)
    subject = ditfastattn.look(model, made.look().jobs, made.arguments | {"num_inference_steps": 12})
    recipe, found = decide(subject, 1.0)
    handover = found.components.index("transformer_2")
    assert found.picks[0] == found.picks[handover] == "FF" and 0 < handover < 11
    assert set("".join(found.picks[1:handover] + found.picks[handover + 1 :])) == {"R"}
    assert {site.partition(".")[0] for site in recipe.timeline["both"]} == {"blocks", "transformer_2"}
    with api.accelerated(pipe, recipe, strict=True) as handle, stages(pipe):
        pipe(**call_of(subject.jobs, subject.arguments), output_type="latent")
        assert handle.report().counters["reuse"] == 2 * 2 * 10


def test_full_heads_may_be_served_by_a_backend(tiny):
    """The decisions are the same; what stays full has the backend, and so has the cross-attention."""
    made = tiny("wan")
    plain, first = decide(made.look(jobs=JOBS[:1]), 1e-5)
    fast, second = decide(made.look(jobs=JOBS[:1], full="auto"), 1e-5)
    assert first.picks == second.picks and fast.timeline == plain.timeline
    assert fast.choices["F"].parameters == {"backend": "auto"} and not plain.choices["F"].parameters
    nothing, _ = decide(made.look(jobs=JOBS[:1], full="auto"), 1e-9)
    layers = {f"blocks.{block}.{name}" for block in range(2) for name in ("attn1", "attn2")}
    assert set(nothing.attention["both"]) == layers
    assert not any("attn2" in site for table in plain.attention.values() for site in table)
    with api.accelerated(made.model.pipe, nothing, strict=True) as handle, stages(made.model.pipe):
        made.model.pipe(**call_of(JOBS[:1], made.arguments), output_type="latent")
        assert handle.report().counters["full_auto"] > 0
