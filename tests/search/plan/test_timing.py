"""Seconds of modules and of the calls in them, by a clock that only moves where a test moves it."""

import dataclasses

import pytest

from dit_accel.search.plan import timing
from dit_accel.search.plan.tables import full_is_faster
from dit_accel.search.subject import look
from dit_accel.visit import AttentionVisit
from tests.search.conftest import JOBS

CALL, BACKEND, AROUND, REST = 12.0, 6.0, 9.0, 70.0  # seconds


class Clock:
    """What `timing` reads."""

    def __init__(self):
        self.seconds = 0.0

    def taking(self, seconds, run):
        """The same function, taking its time."""

        def slow(*given):
            self.seconds += seconds
            return run(*given)

        return slow


@pytest.fixture
def clock(monkeypatch):
    """Attention calls of `CALL` seconds by the model, of `BACKEND` through a backend."""
    made, dense = Clock(), AttentionVisit.dense
    monkeypatch.setattr(timing, "now", lambda: made.seconds)
    monkeypatch.setattr(AttentionVisit, "dense", made.taking(CALL, dense))
    monkeypatch.setattr(timing, "full_of", made.taking(BACKEND, dense))
    run = timing.generate

    def generate(*given):
        began = made.seconds
        sample = run(*given)
        return dataclasses.replace(sample, seconds=made.seconds - began + REST)

    monkeypatch.setattr(timing, "generate", generate)
    return made


@pytest.mark.parametrize("case", ["wan", "pixart_sigma"])
def test_a_call_and_what_is_around_it_are_told_apart(case, tiny, clock):
    made = tiny(case)
    subject = look(made.model, JOBS[:1], made.arguments)
    for key in subject.all_attention():
        subject.attention(key).to_q.register_forward_pre_hook(clock.taking(AROUND, lambda *_given: None))
    found = timing.measure(subject)
    shared = 2 if case == "pixart_sigma" else 1  # a module call that serves both branches counts half
    assert set(found.modules) == set(subject.all_attention())
    for each in found.modules.values():
        assert each.dense == pytest.approx(CALL / shared)
        assert each.full == pytest.approx(BACKEND / shared)
        assert each.around == pytest.approx(AROUND / shared)
    assert full_is_faster(list(found.modules.values()))
    assert not full_is_faster([timing.ModuleSeconds(0.1, 0.2, 0.2)])
    # the model's own processors run the dense one: no call of it is seen, what is around it is
    assert found.whole > REST and found.rest == pytest.approx(REST)
