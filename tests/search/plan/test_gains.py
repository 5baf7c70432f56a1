"""What a layer's reuse moves the velocity by, against two plain runs."""

import numpy as np
import pytest

from dit_accel import api
from dit_accel.generate import generate
from dit_accel.recipe import Recipe
from dit_accel.search.plan import gains, measuring, probes
from dit_accel.search.subject import denoisers_of, look
from tests.search.conftest import JOBS

GUIDANCE = 4.0


def velocities(made, recipe):
    """The guided velocity of every step, without a learned variance."""
    seen = []
    transformer = denoisers_of(made.model)["transformer"]
    width = transformer.config.in_channels if transformer.config.get("out_channels") else None
    hook = transformer.register_forward_hook(lambda _m, _a, out: seen.append(out[0].double()))
    try:
        with api.accelerated(made.model.pipe, recipe):
            generate(made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed)
    finally:
        hook.remove()
    if made.model.family.guidance == "batched":
        pairs = [each[:, :width].chunk(2)[::-1] for each in seen]
    else:
        pairs = zip(seen[::2], seen[1::2], strict=True)
    return [GUIDANCE * cond + (1 - GUIDANCE) * uncond for cond, uncond in pairs]


@pytest.mark.parametrize("case", ["wan", "pixart_sigma", "qwen_image", "cogvideox"])
def test_a_gain_is_what_the_velocity_moved_by_over_what_was_scored(case, tiny):
    made = tiny(case)
    subject = look(made.model, JOBS[:1], made.arguments)
    noted = measuring.score(subject, (), 2, measuring.look_at_attention(subject), JOBS[0])
    found = gains.measure(subject, JOBS[0], noted)
    dense = velocities(made, Recipe.neutral())
    assert set(found) == set(subject.all_attention())
    for step in (1, 4, 8):  # of nine, looked at
        for key in subject.all_attention():
            changed = velocities(made, probes.reusing_at(subject, step, [key]))
            moved = float((changed[step] - dense[step]).square().sum())
            assert moved > 0
            wanted = moved / noted[key].module[step, 0]
            assert found[key][step] == pytest.approx(wanted, rel=0.02)
    middle = next(iter(found.values()))[3]
    assert np.isfinite(middle) and middle > 0


def test_scaled_notes_are_scaled_everywhere(tiny):
    made = tiny("wan")
    subject = look(made.model, JOBS[:1], made.arguments)
    felt = measuring.look_at_attention(subject)
    factors = np.arange(1.0, 10.0)
    plain, scaled = (measuring.score(subject, (), 2, felt, JOBS[0]) for _ in range(2))
    for key, one in scaled.items():
        one.scale(factors)
        for name, array in plain[key].arrays().items():
            if not name.startswith("seconds"):
                wanted = array * factors.reshape(-1, *[1] * (array.ndim - 1))
                assert np.allclose(one.arrays()[name], wanted)


def test_a_denoiser_is_compared_at_its_own_steps_alone(tiny, monkeypatch):
    """As one of two, which runs from step 4 on: before it there is nothing to compare."""
    made = tiny("wan")
    subject = look(made.model, JOBS[:1], made.arguments)
    noted = measuring.score(subject, (), 2, measuring.look_at_attention(subject), JOBS[0])
    own, *others = subject.all_attention()
    moved = {(own, step): factor * noted[own].module[step, 0] for step, factor in ((4, 9.0), (6, 4.0))}
    monkeypatch.setattr(gains, "_moved", lambda *given: moved)
    found = gains.measure(subject, JOBS[0], noted)
    assert np.allclose(found[own], [9, 9, 9, 9, 9, 6, 4, 4, 4])
    assert all(np.array_equal(found[key], np.ones(9)) for key in others)
