"""Runs that change something late take what lies before it from a dense run: the frames are the same."""

import numpy as np
import pytest

from dit_accel import api
from dit_accel.generate import generate
from dit_accel.search.plan import measuring, probes
from dit_accel.search.plan.replay import Replay
from dit_accel.search.subject import denoisers_of, look
from tests.search.conftest import JOBS


@pytest.mark.parametrize("case", ["wan", "pixart_sigma", "cogvideox", "qwen_image"])
def test_a_replayed_beginning_changes_nothing_but_the_work(case, tiny):
    made = tiny(case)
    call = made.model, JOBS[0].prompt, made.arguments, JOBS[0].seed
    subject = look(made.model, JOBS[:1], made.arguments)
    replay = Replay(denoisers_of(made.model))
    with replay.recording():
        dense = generate(*call).frames
    block = next(iter(denoisers_of(made.model).values())).get_submodule(subject.layers()[0][1])
    ran = []
    hook = block.register_forward_hook(lambda *given: ran.append(1))
    try:
        for step in (1, 4, 8):
            recipe = probes.reusing_at(subject, step, subject.layers())
            with api.accelerated(made.model.pipe, recipe):
                wanted = generate(*call).frames
            ran.clear()
            with api.accelerated(made.model.pipe, recipe) as handle, replay.until(step - 1):
                found = generate(*call).frames
                assert handle.report().counters["reuse"] > 0
            branches = 2 if made.model.family.guidance == "sequential" else 1
            assert len(ran) == branches * (10 - step)  # step - 1, which is read, and all after it
            assert np.array_equal(found, wanted) and not np.array_equal(found, dense)
    finally:
        hook.remove()
    assert np.array_equal(generate(*call).frames, dense)


def test_a_step_weighs_what_the_frames_moved_by_over_what_was_scored(tiny):
    made = tiny("wan")
    subject = look(made.model, JOBS[:1], made.arguments)
    job = JOBS[0]
    noted = measuring.score(subject, (), 2, measuring.look_at_attention(subject), job)
    weights = probes.step_weights(subject, job, noted)
    dense = generate(made.model, job.prompt, made.arguments, job.seed).frames
    for step in (1, 6, 8):
        assert step in probes.probed_at(9)
        with api.accelerated(made.model.pipe, probes.reusing_at(subject, step, subject.layers())):
            frames = generate(made.model, job.prompt, made.arguments, job.seed).frames
        moved = float(np.square(frames.astype(float) - dense).sum())
        scored = sum(noted[key].module[step, 0] for key in subject.layers())
        assert weights[step] == pytest.approx(moved / scored, rel=1e-4)
    assert weights[0] == weights[1]


def test_steps_are_probed_most_closely_at_the_end():
    assert probes.probed_at(5) == [1, 2, 3, 4]
    for steps in (12, 20, 50):
        gaps = np.diff(probes.probed_at(steps))
        assert gaps[-1] == 1 and (np.diff(gaps) <= 0).all()
        assert probes.probed_at(steps)[0] == 1 and probes.probed_at(steps)[-1] == steps - 1
