"""What is scored against the same thing computed from the tensors of a plain run."""

import numpy as np
import pytest
import torch

from dit_accel import api
from dit_accel.bricks import lay_bricks
from dit_accel.generate import generate
from dit_accel.plan import Plan
from dit_accel.recipe import Recipe
from dit_accel.search.plan import felt as weighing
from dit_accel.search.plan import measuring, probes, scores
from dit_accel.search.plan.candidates import Candidate, menu, near_sets
from dit_accel.search.plan.noted import Noted
from dit_accel.search.plan.segments import REUSE
from dit_accel.search.subject import look
from dit_accel.timeline import BRANCHES, Entry, Track
from dit_accel.visit import AttentionVisit
from tests.search.conftest import JOBS

SITE = {
    "wan": "blocks.1.attn1",
    "pixart_sigma": "transformer_blocks.1.attn1",
    "qwen_image": "transformer_blocks.1.attn",
}
CROSS = {"wan": "blocks.1.attn2", "pixart_sigma": "transformer_blocks.1.attn2"}
GUIDANCE = 4.0
AGES = 3
LARGER = {  # of several bricks
    "wan": {"height": 192, "width": 256, "num_frames": 13},
    "pixart_sigma": {},
    "qwen_image": {"height": 320, "width": 320},
}


class Keeper:
    """Keeps what full attention gives at every step and branch."""

    seams, computes, exact, needs_grid = frozenset({"attention"}), True, False, False

    def __init__(self, branch, session, kept):
        self.branch, self.session, self.kept = branch, session, kept

    def attend(self, visit):
        out = visit.dense()
        self.kept[self.branch, self.session.at.step] = out.double(), visit.num_text
        return out


def _entry(method, heads):
    return Entry("." * heads, ((method, tuple(range(heads))),), {})


def outputs(made, site, levels):
    """(branch, step) -> (full attention of all heads, text rows) of a dense run."""
    kept = {}
    with api.accelerated(made.model.pipe, Recipe.neutral()) as handle:
        heads = handle.session.denoisers["transformer"].attention[site]
        rows = {
            branch: (_entry(Keeper(branch, handle.session, kept), heads),) * len(levels)
            for branch in BRANCHES
        }
        handle.session.plan = Plan({("transformer", site): Track(rows, 0)}, {}, {}, levels, {}, ())
        generate(made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed)
    return kept


def scored(made, chosen, ages=AGES):
    subject = look(made.model, JOBS[:1], made.arguments)
    felt = measuring.look_at_attention(subject)
    return subject, felt, measuring.score(subject, chosen, ages, felt, JOBS[0])


def metric(made, site, channels):
    """S^T S of the visual rows [H d, H d], from the module itself."""
    weight = made.model.pipe.transformer.get_submodule(site).to_out[0].weight.detach().double()
    return weight.T @ torch.diag(torch.from_numpy(channels[0])) @ weight


@pytest.mark.parametrize(("case", "site"), [*SITE.items(), *CROSS.items()])
def test_reuse_and_share_are_what_old_outputs_are_off_by(case, site, tiny):
    made = tiny(case)
    subject, felt, noted = scored(made, ())
    kept = outputs(made, site, subject.levels)
    found, step, age = noted["transformer", site], 5, 2

    def changed(branch):
        (now, text), (old, _) = kept[branch, step], kept[branch, step - age]
        rows = slice(text, None) if made.model.family.token_order.startswith("text") else slice(None)
        return (old - now)[:, rows]

    cond, uncond = changed("cond"), changed("uncond")
    gram = metric(made, site, felt["transformer", site][step])
    both = (GUIDANCE * cond + (1 - GUIDANCE) * uncond).flatten(2)
    share = ((1 - GUIDANCE) * (uncond - cond)).flatten(2)
    by_hand = [float(torch.einsum("bni,ij,bnj->", wrong, gram, wrong)) for wrong in (both, share)]
    if subject.text == 0:
        assert found.module[step, age - 1] == pytest.approx(by_hand[0], rel=1e-3)
        assert found.shared[step, age - 1] == pytest.approx(by_hand[1], rel=1e-3)
    else:  # text rows count besides
        assert found.module[step, age - 1] >= 0.999 * by_hand[0]
    width = cond.shape[3]
    for head in range(cond.shape[2]):
        block = gram[head * width : (head + 1) * width, head * width : (head + 1) * width]
        own = share.unflatten(2, (-1, width))[:, :, head]
        error = float(torch.einsum("bni,ij,bnj->", own, block, own))
        assert found.share[step, age - 1, head] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("case", SITE)
def test_an_anchored_candidate_is_scored_as_it_would_run(case, tiny, monkeypatch):
    """A recipe of tails whose anchor is `age` steps old gives the very error that was scored."""
    monkeypatch.setattr(weighing, "SAMPLED", 10**6)
    made = tiny(case, **LARGER[case])
    site = SITE[case]
    extent = next(iter(near_sets(made.look().grid)))
    tail, residual = (Candidate(method, {"extent": extent}, 0.5) for method in ("tail", "residual"))
    subject, felt, noted = scored(made, (tail, residual))
    found = noted["transformer", site]
    kept = outputs(made, site, subject.levels)
    step, back = 4, torch.argsort(lay_bricks(subject.grid).order)  # its tokens stand in brick order
    for candidate in (tail, residual):
        letters = ["F"] * len(subject.levels)
        letters[step - 2], letters[step] = "T", "t"
        edges = [1.0, *((a + b) / 2 for a, b in zip(subject.levels, subject.levels[1:], strict=False)), 0.0]
        choice = {"method": candidate.method, "extent": extent, "max_age": 4}
        recipe = Recipe.from_dict({
            "schema": 1, "made_for": {"steps": len(subject.levels)},
            "choices": {"F": {"method": "full"}, "t": choice, "T": {**choice, "refresh": True}},
            "noise": {"edges": edges}, "attention": {"both": {site: letters}},
        })  # fmt: skip
        wrong = {}
        with api.accelerated(made.model.pipe, recipe, strict=True):
            attention = made.model.pipe.transformer.get_submodule(site)
            call = made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed
            seen = _inputs_of_projection(attention, lambda call=call: generate(*call))
        batched = made.model.family.guidance == "batched"
        for branch in BRANCHES:
            at = seen[step] if batched else seen[2 * step + (branch == "uncond")]
            at = (at.chunk(2)[branch == "cond"] if batched else at)[:, back]
            out, text = kept[branch, step]
            out = out[:, text:] if made.model.family.token_order.startswith("text") else out
            wrong[branch] = (at.double() - out.flatten(2)).unflatten(2, out.shape[2:])
        both = GUIDANCE * wrong["cond"] + (1 - GUIDANCE) * wrong["uncond"]
        gram, width = metric(made, site, felt["transformer", site][step]), both.shape[3]
        for head in range(both.shape[2]):
            block = gram[head * width : (head + 1) * width, head * width : (head + 1) * width]
            error = float(torch.einsum("bni,ij,bnj->", both[:, :, head], block, both[:, :, head]))
            mine = found.pair[candidate][step, 1, head]
            assert mine == pytest.approx(error, rel=0.02) if subject.text == 0 else mine >= 0.98 * error


def _inputs_of_projection(attention, run):
    """The heads' outputs of every call, as the output projection gets them."""
    seen = []
    hook = attention.to_out[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    try:
        run()
    finally:
        hook.remove()
    return seen


def test_an_attention_whose_processor_attends_twice_is_left_alone(tiny, monkeypatch):
    """Image keys of Wan I2V: the module's answer is the sum of both calls, and one alone was scored."""
    made = tiny("wan")
    twice = property(lambda visit: visit.call.key[1] == CROSS["wan"] and visit.step == 8)
    monkeypatch.setattr(AttentionVisit, "again", twice)
    _, _, noted = scored(made, ())
    for key, each in noted.items():
        tables = *each.pair.values(), *each.lone.values(), each.share, each.module, each.shared
        assert all(np.isinf(table).all() for table in tables) == (key[1] == CROSS["wan"])


def test_what_lies_before_the_run_is_infinite(tiny):
    made = tiny("wan")
    _, _, noted = scored(made, ())
    for each in noted.values():
        assert np.isinf(each.module[1, 1]) and np.isfinite(each.module[1, 0])
        assert np.isinf(each.module[0]).all()


def test_notes_survive_a_file(tiny):
    made = tiny("pixart_sigma")
    chosen = menu(made.look().grid, 0)
    _, _, noted = scored(made, chosen)
    one = noted["transformer", SITE["pixart_sigma"]]
    again = Noted.read(one.arrays(), chosen)
    assert again.arrays().keys() == one.arrays().keys()
    assert all(np.array_equal(again.arrays()[name], array) for name, array in one.arrays().items())
    assert set(again.pair) == {REUSE, *chosen}


def test_scoring_along_a_recipe_answers_with_the_recipe(tiny):
    made = tiny("wan")
    subject = look(made.model, JOBS[:1], made.arguments)
    felt = measuring.look_at_attention(subject)
    recipe = probes.reusing_at(subject, 4, subject.layers())
    frames = []
    real = measuring.generate
    try:
        measuring.generate = lambda *given: frames.append(real(*given[:4])) or frames[-1]
        along = measuring.score(subject, (), AGES, felt, JOBS[0], recipe)
        dense = measuring.score(subject, (), AGES, felt, JOBS[0])
    finally:
        measuring.generate = real
    with api.accelerated(made.model.pipe, recipe):
        wanted = generate(made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed)
    assert np.abs(frames[0].frames - wanted.frames).max() < 1e-5
    key = "transformer", SITE["wan"]
    assert np.allclose(along[key].module[4], dense[key].module[4])  # the same latents up to here
    assert not np.allclose(along[key].module[6, 0], dense[key].module[6, 0], rtol=1e-6)


def test_steps_between_those_scored_are_interpolated(tiny, monkeypatch):
    """Tails and coresets are scored at one step of two; what is too old stays infinite."""
    made = tiny("wan", **LARGER["wan"])
    chosen = [each for each in menu(made.look().grid) if each.passes_alone]
    assert {each.method for each in chosen} == {"tail", "coreset"}
    monkeypatch.setattr(scores, "EARLY", 0)
    scores.sampled.cache_clear()
    try:
        _, _, noted = scored(made, chosen)
        assert sorted(scores.sampled(9)) == [0, 2, 4, 6, 8]
    finally:
        scores.sampled.cache_clear()
    one = noted["transformer", SITE["wan"]]
    for table in (one.pair, one.lone):
        for kind in chosen:
            errors = table[kind]
            ages = slice(0, 2) if kind.anchored else slice(None)
            middle = np.sqrt(errors[4, ages] * errors[6, ages])
            assert np.allclose(errors[5, ages], middle) and np.isfinite(middle).all()
            if kind.anchored:  # a tail that is 1 step old: nothing was scored at step 0
                assert np.array_equal(errors[1, 0], errors[2, 0]) and np.isinf(errors[1, 1:]).all()
