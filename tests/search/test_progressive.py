"""The head-wise search: against a replay in plain PyTorch, and against a run of the recipe it wrote."""

import math

import pytest
import torch

from dit_accel import api
from dit_accel.errors import BadUsage
from dit_accel.memory import Memory
from dit_accel.recipe import Recipe
from dit_accel.search.ditfastattn_v2 import search as ditfastattn_v2
from dit_accel.search.ditfastattn_v2.progressive import HeadDecisions, place_of
from dit_accel.search.method import TimeIsUp
from dit_accel.search.saved import Saved
from dit_accel.search.subject import call_of
from dit_accel.stages import stages
from dit_accel_kernels.block_attention import break_even
from tests.search.conftest import JOBS, decide
from tests.search.head_replay import HeadReplay

ALL = ("pixart_sigma", "wan", "cogvideox", "qwen_image")


def look(made, jobs=JOBS[:1], **more):
    return ditfastattn_v2.look(made.model, jobs, made.arguments, **more)


def bands(case):
    """The published bands at these sizes, by hand: letter -> (mask [V, V], half-width as a share)."""
    if case == "pixart_sigma":  # 32 rows of 16 in blocks of 8 rows: 2 rows each side, 1 row, half a row
        block = torch.arange(512) // 128
        apart = (block[:, None] - block[None]).abs()
        return {"a": (apart <= 1, 1 / 16), "c": (apart == 0, 1 / 64)}
    frames, rest = {"wan": (4, 6), "cogvideox": (3, 6)}[case]  # less than a frame on each side
    frame = torch.arange(frames * rest) // rest
    return {"a": (frame[:, None] == frame[None], 1 / 16)}


@pytest.mark.parametrize(
    ("case", "error", "delta"),
    [
        ("pixart_sigma", "projected", 4e-3),
        ("pixart_sigma", "head", 3e-2),
        ("wan", "projected", 2e-2),
        ("cogvideox", "projected", 4e-3),
        ("cogvideox", "head", 3e-2),
    ],
)
def test_decisions_are_those_of_a_replay(case, error, delta, tiny):
    made = tiny(case)
    search = look(made, error=error)
    _, found = decide(search, delta)
    masks = bands(case)
    visual, text = math.prod(search.grid), search.text
    assert {each.letter for each in search.candidates.candidates} == {"r", *masks}
    gains = {x: ((visual - half * visual) / (visual + text)) ** 2 for x, (_, half) in masks.items()} | {
        "r": 1
    }
    batched = made.model.family.guidance == "batched"
    modules = [search.attention(key) for key in search.layers()]
    only_masks = {x: mask for x, (mask, _) in masks.items()}
    replay = HeadReplay(modules, batched, only_masks, gains, delta, error == "projected")
    pipe = made.model.pipe
    with replay.installed(), stages(pipe):
        pipe(**call_of(search.jobs, search.arguments), output_type="latent")
    theirs = {place_of(b, search.layers()[n]): row for (n, b), row in replay.picks.items()}
    assert found.picks == theirs
    used = set("".join(text for row in theirs.values() for text in row))
    assert used >= {"F", "r"} and any(len(set(x)) > 1 for row in theirs.values() for x in row)
    for (number, branch), steps in replay.errors.items():
        mine = found.errors[place_of(branch, search.layers()[number])]
        for step, errors in enumerate(steps, 1):
            assert mine[str(step)].keys() == errors.keys()
            for letter, own in errors.items():
                assert mine[str(step)][letter] == pytest.approx(own, rel=0.01, abs=1e-9)


def latents_of(search, run):
    """What the denoiser answers at each call, and the latents at the end."""
    seen = []
    pipe = search.model.pipe
    hook = pipe.transformer.register_forward_hook(lambda *given: seen.append(given[2][0].clone()))
    try:
        run()
    finally:
        hook.remove()
    return torch.stack([x.flatten() for x in seen])


@pytest.mark.parametrize("menu", ["v2", "ours", "plain"])
@pytest.mark.parametrize("case", ALL)
def test_the_recipe_computes_what_the_search_saw(case, menu, tiny):
    search = look(tiny(case), jobs=JOBS, menu=menu)
    found, pipe = {}, search.model.pipe

    def searching():
        found["recipe"], found["decisions"] = decide(search, 2e-2 if case == "wan" else 2e-3)

    def running():
        with api.accelerated(pipe, recipe, strict=True) as handle, stages(pipe):
            pipe(**call_of(search.jobs, search.arguments), output_type="latent")
            found["report"] = handle.report()

    seen = latents_of(search, searching)
    recipe = Recipe.from_text(found["recipe"].to_toml())
    again = latents_of(search, running)
    assert seen.shape == again.shape
    # an anchor is full attention by another kernel than that of a full head
    assert float((seen - again).abs().max() / seen.abs().max()) < 2e-6
    picks = found["decisions"].picks
    assert len(set("".join(text for row in picks.values() for text in row))) >= 2
    assert not [note for note in found["report"].notes if "dense" in note]
    for row in found["report"].rows:  # capitals are full passes, "." in a report
        ran = ["".join("F" if x == "." or x.isupper() else x for x in text) for text in row.ran]
        branch = "cond" if row.branch == "both" else row.branch
        wanted = picks[place_of(branch, ("transformer", row.site))]
        # where all heads take what is there the module may, one letter for it
        assert [x if len(x) > 1 else x * len(text) for x, text in zip(ran, wanted, strict=True)] == wanted


@pytest.mark.parametrize("menu", ["v2", "ours", "plain"])
def test_without_anchors_the_recipe_is_bit_equal(menu, tiny):
    search, made = look(tiny("wan"), jobs=JOBS, menu=menu), []
    pipe = search.model.pipe
    answers = latents_of(search, lambda: made.append(decide(search, 2e-2)[0]))
    recipe = made[0]

    def running():
        with api.accelerated(pipe, recipe, strict=True), stages(pipe):
            pipe(**call_of(search.jobs, search.arguments), output_type="latent")

    assert torch.equal(answers, latents_of(search, running))


@pytest.mark.parametrize(
    ("case", "menu", "rows"),
    [
        # every candidate, both tails side by side, a full pass that several heads complete at other steps
        ("pixart_sigma", "ours", "FFFF tuwx rrry tuwF FFFt utut rrxt utux FFFF"),
        # modules that share, that may not as one head computed since, and heads that do beside others
        (
            "pixart_sigma",
            "ours",
            "FFFF dddd/rrrr ssss/rrrr FsFs/FFFF dFdF/rrFF rrrr/FFFF FFFF dddd/FFFF dddd/rrrr",
        ),
        # text stays exact: no module of a joint attention is skipped for a share, and cond's heads are read
        (
            "cogvideox",
            "ours",
            "FFFF dddd/rrrr ssss/rrrr FFFs/FFFF rrds/FFFr rrFs/rrrF FFFF rrrr/rrrr dddF/rrrr",
        ),
        ("pixart_sigma", "v2", "FFFF arcF rrrr caFr acac rrrr rrrr Facr FFFF"),
        ("cogvideox", "v2", "FFFF aaFr rrar raFr rrrr rrrr aaaa Faar FFFF"),
    ],
)
def test_given_picks_run_as_their_recipe(case, menu, rows, tiny):
    """Rows are cond's, and uncond's in the other order; or uncond's, with cond's behind a stroke."""
    search, made = look(tiny(case), jobs=JOBS, menu=menu), []
    decisions, pipe = search.decided(), search.model.pipe
    pairs = [text.split("/") if "/" in text else (text[::-1], text) for text in rows.split()]
    for key in search.layers():
        cond, uncond = ([pair[at] for pair in pairs] for at in (1, 0))
        for branch, row in (("cond", cond), ("uncond", uncond)):
            decisions.picks[place_of(branch, key)] = row
            for step, text in enumerate(row):
                pasts = decisions.histories(place_of(branch, key), step, 4)
                theirs = decisions.histories(place_of("cond", key), step + 1, 4)
                theirs = theirs if branch == "uncond" else [""] * 4
                each = zip(text, pasts, theirs, strict=True)
                assert all(search.candidates.legal(*one) for one in each), (branch, step)
    seen = latents_of(search, lambda: made.append(decide(search, 1.0, decisions=decisions)[0]))
    assert not decisions.errors

    def running():
        with api.accelerated(pipe, made[0], strict=True), stages(pipe):
            pipe(**call_of(search.jobs, search.arguments), output_type="latent")

    again = latents_of(search, running)
    assert float((seen - again).abs().max() / seen.abs().max()) < 2e-6


def test_branches_decide_for_themselves(tiny):
    """Where text differs enough, what uncond may save is not what cond may."""
    search = look(tiny("qwen_image"), error="head")
    recipe, found = decide(search, 2e-2)
    key = search.layers()[1]
    assert set(recipe.attention) == {"cond", "uncond"}
    assert found.picks[place_of("cond", key)] != found.picks[place_of("uncond", key)]


def test_without_guidance_there_is_one_branch(tiny):
    search = look(tiny("wan", guidance_scale=1.0))
    recipe, found = decide(search, 1e-2)
    assert {place.split()[0] for place in found.picks} == {"cond"}
    assert set(recipe.attention) == {"both"}


def test_between_two_decisions_a_head_keeps_its_pick(tiny):
    search = look(tiny("wan"), interval=3)
    _, found = decide(search, 1e-2)
    for place, row in found.picks.items():
        decided = [int(step) for step, errors in found.errors[place].items() if errors]
        assert decided == [1, 4, 7]
        assert [row[k] for k in (2, 3, 5, 6, 8)] == [row[k] for k in (1, 1, 4, 4, 7)]
    assert any("r" in row[1] for row in found.picks.values())


def test_a_held_pick_that_became_too_old_is_full_for_a_step(tiny):
    search = look(tiny("wan"), menu="ours", interval=8)
    _, found = decide(search, 10.0)
    assert all("".join(text[0] for text in row) == "FrrFrrFrr" for row in found.picks.values())


class Stopped(Exception):
    """What ends a process, as far as a search can tell."""


@pytest.mark.parametrize("after", [2, 9, 14])
def test_an_interrupted_search_ends_with_the_same_recipe(after, tiny, tmp_path):
    search = look(tiny("wan"), menu="v2")
    whole, through = decide(search, 1e-2)
    kept = Saved(tmp_path / "x.json", search.asked(), HeadDecisions)
    left = after

    def stop():
        nonlocal left
        kept.save()
        left -= 1
        if left < 0:
            raise Stopped

    with pytest.raises(Stopped):
        decide(search, 1e-2, saved=stop, decisions=kept.decisions(1e-2))
    found = Saved(tmp_path / "x.json", search.asked(), HeadDecisions).decisions(1e-2)
    assert sum(map(len, found.picks.values())) == after + 1 and not found.finished
    rest, after_all = decide(search, 1e-2, decisions=found)
    assert rest.to_toml() == whole.to_toml()
    assert (after_all.picks, after_all.errors) == (through.picks, through.errors)


def test_a_budget_leaves_the_rest_full(tiny):
    search, asked = look(tiny("wan")), []
    recipe, found = decide(search, 10.0, ended=lambda: len(asked) > 5 or asked.append(1))
    assert not found.finished and found.steps == 3
    first, second = (recipe.attention["cond"][site] for site in ("blocks.0.attn1", "blocks.1.attn1"))
    # two layers, cond before uncond: cond of the first step on, both of its second
    assert [x[0] for x in first] == [x[0] for x in second] == ["F", "r", "r", "F"][: len(first)]
    assert recipe.attention["uncond"]["blocks.0.attn1"][2][0] == "F"


def test_a_search_leaves_the_pipeline_as_it_was(tiny):
    made = tiny("cogvideox")
    transformer = made.model.pipe.transformer
    before = {name: module.__dict__.keys() for name, module in transformer.named_modules()}
    first, second = decide(look(made), 1e-3), decide(look(made), 1e-3)
    assert {name: module.__dict__.keys() for name, module in transformer.named_modules()} == before
    assert first[1].picks == second[1].picks and first[1].errors == second[1].errors


def test_what_is_slower_than_dense_here_is_left_out(tiny, monkeypatch):
    monkeypatch.setattr(break_even, "density", lambda *given: 0.0)
    search = look(tiny("pixart_sigma"), menu="ours")
    _, found = decide(search, 10.0)
    assert {x for row in found.picks.values() for text in row for x in text} <= {*"Frsd"}
    assert [note for note in found.notes if note.startswith("tail_own is left out: density")]
    assert len(found.notes) == 5


def test_two_denoisers_each_begin_full(tiny):
    from dit_accel.loading import Model
    from dit_accel.testing import TINY

    made = tiny("wan")
    pipe = TINY["wan22"].build(layers=1)
    for name in ("vae", "text_encoder", "tokenizer"):
        pipe.register_modules(**{name: getattr(made.model.pipe, name)})
    model = Model("tiny", pipe, made.model.family, {}, True)
    search = ditfastattn_v2.look(model, JOBS[:1], made.arguments | {"num_inference_steps": 12})
    recipe, found = decide(search, 10.0)
    first, second = (found.picks[f"cond {name}.blocks.0.attn1"] for name in ("transformer", "transformer_2"))
    handover = len(first)
    assert first == ["FFFF"] + ["rrrr"] * (handover - 1) and 1 < handover < 11
    assert second == [""] * handover + ["FFFF"] + ["rrrr"] * (11 - handover)
    with api.accelerated(pipe, recipe, strict=True) as handle, stages(pipe):
        pipe(**call_of(search.jobs, search.arguments), output_type="latent")
        assert handle.report().counters["reuse"] == 2 * 10  # modules: nothing of them runs


@pytest.mark.parametrize(("menu", "case"), [("v2", "wan"), ("ours", "pixart_sigma"), ("ours", "cogvideox")])
def test_memory_is_foreseen(menu, case, tiny, monkeypatch):
    search = look(tiny(case), menu=menu)
    peaks, own = [], Memory.store_heads

    def store(self, *args, **rest):
        own(self, *args, **rest)
        peaks.append(self.peak_bytes)

    monkeypatch.setattr(Memory, "store_heads", store)
    decide(search, 1e-3)
    projections = sum(
        4 * search.width(key) ** 2 // heads * (1 + search.joint) for key, heads in search.heads.items()
    )
    assert max(peaks) == search.stored_bytes() - projections
    with pytest.raises(BadUsage, match=r"--memory-gb allows 0\.0"):
        look(tiny(case), menu=menu, memory_gb=1e-6)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"menu": "theirs"}, 'menu "theirs"; known: v2, ours, plain'),
        ({"error": "none"}, 'error "none"; known: projected, head'),
        ({"interval": 0}, "a decision every 0 steps"),
        ({"full": "fast"}, 'full heads by "fast"; known: model, auto'),
    ],
)
def test_what_cannot_be_searched_is_refused(asked, words, tiny):
    with pytest.raises(BadUsage, match=words):
        look(tiny("wan"), **asked)


def test_full_heads_may_be_served_by_the_fastest_backend(tiny):
    search = look(tiny("pixart_sigma"), full="auto")
    recipe, _ = decide(search, 1e-9)
    assert recipe.choices["F"].parameters == {"backend": "auto"}
    assert recipe.attention["both"]["transformer_blocks.0.attn1"] == ("FFFF",)
    assert recipe.attention["both"]["transformer_blocks.1.attn2"] == ("F",)
    with api.accelerated(search.model.pipe, recipe, strict=True) as handle, stages(search.model.pipe):
        search.model.pipe(**call_of(search.jobs, search.arguments), output_type="latent")
        assert set(handle.report().counters) == {"full_auto"}


def test_the_budget_is_asked_before_a_layer_is_tried(tiny):
    search, seen = look(tiny("wan")), []
    decisions = search.decided()
    with pytest.raises(TimeIsUp):
        search.run(1e-2, decisions, lambda: True, lambda: seen.append(1), lambda done, total: None)
    assert len(seen) == 4 and all(row == ["FFFF"] for row in decisions.picks.values())
