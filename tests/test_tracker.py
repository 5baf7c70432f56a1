"""Step, run and branch, from what a scheduler and a pipeline show."""

from types import SimpleNamespace

import pytest
import torch

from dit_accel.tracker import Tracker


class Scheduler:
    """Flow matching with as much bookkeeping as a test asks for."""

    def __init__(self, counts: bool = True):
        self.config = {"num_train_timesteps": 1000}
        self.num_inference_steps = None
        self.timesteps = torch.arange(1000.0)
        if counts:
            self.step_index = None

    def set_timesteps(self, steps: int):
        self.num_inference_steps = steps
        self.timesteps = torch.linspace(1000, 1000 / steps, steps)
        if hasattr(self, "step_index"):
            self.step_index = None


def pipeline(counts: bool = True, steps: int = 4, **more):
    pipe = SimpleNamespace(scheduler=Scheduler(counts), **more)
    pipe.scheduler.set_timesteps(steps)
    return pipe


def latents(batch: int = 1, paired: bool = False) -> torch.Tensor:
    x = torch.randn(batch, 3)
    return torch.cat([x, x]) if paired else x


def advance(tracker, pipe, timestep, guidance="sequential", context=None, x=None, component="transformer"):
    inputs = {"timestep": torch.as_tensor(timestep), "hidden_states": latents() if x is None else x}
    return tracker.advance(pipe, component, guidance, context, inputs)


def where(position) -> tuple[int, str, bool]:
    return position.step, position.branch, position.new_run


@pytest.mark.parametrize("counts", [True, False])
def test_two_calls_a_step_are_cond_and_uncond(counts: bool):
    tracker, pipe = Tracker(), pipeline(counts)
    found = []
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        if counts and step:
            pipe.scheduler.step_index = step
        found += [where(advance(tracker, pipe, timestep.expand(2))) for _ in range(2)]
    assert found == [
        (step, branch, step == 0 and branch == "cond") for step in range(4) for branch in ("cond", "uncond")
    ]
    assert tracker.levels == (1.0, 0.75, 0.5, 0.25)
    assert tracker.runs == 1


def test_the_context_knows_step_and_branch_best():
    tracker, pipe = Tracker(), pipeline()
    pipe.scheduler.step_index = 1
    assert where(advance(tracker, pipe, 1000.0, context=("uncond", 2))) == (2, "uncond", True)
    assert where(advance(tracker, pipe, 1000.0, context=("cond", 2))) == (2, "cond", False)
    assert where(advance(tracker, pipe, 1000.0, context=("pred_uncond", 3))) == (3, "uncond", False)


def test_a_context_without_a_step_leaves_it_to_the_scheduler():
    tracker, pipe = Tracker(), pipeline()
    pipe.scheduler.step_index = 2
    assert where(advance(tracker, pipe, 1000.0, context=("uncond", None))) == (2, "uncond", True)


def test_an_unknown_context_name_leaves_the_branch_to_the_order():
    tracker, pipe = Tracker(), pipeline(counts=False)
    names = [advance(tracker, pipe, 750.0, context=("cond_uncond", None)).branch for _ in range(2)]
    assert names == ["cond", "uncond"]


@pytest.mark.parametrize(
    ("timestep", "step"),
    [
        (1000.0, 0), (750.0, 1), (250.0, 3), (0.5, 2), (1.0, 0), (748.0, 1), (600.0, -1), (0.4, -1),
        ([[0.0, 0.0, 500.0, 500.0]], 2),  # first-frame tokens of TI2V stand at 0
    ],
)  # fmt: skip
def test_the_step_of_a_timestep(timestep, step: int):
    """As it is, or divided by the training steps; what is not near any step of the schedule is outside."""
    assert advance(Tracker(), pipeline(counts=False), timestep).step == step


def test_steps_beyond_the_schedule_are_outside():
    tracker, pipe = Tracker(), pipeline()
    pipe.scheduler.step_index = 4
    assert advance(tracker, pipe, 0.0).step == -1


def test_new_timesteps_are_a_new_run_even_if_equal():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert advance(tracker, pipe, 1000.0).new_run
    assert not advance(tracker, pipe, 1000.0).new_run
    pipe.scheduler.set_timesteps(4)
    assert where(advance(tracker, pipe, 1000.0)) == (0, "cond", True)
    assert tracker.runs == 2


def test_a_step_that_goes_back_is_a_new_run():
    """A user's own loop may keep one schedule."""
    tracker, pipe = Tracker(), pipeline(counts=False)
    for timestep in (1000.0, 750.0, 500.0):
        advance(tracker, pipe, timestep)
    assert where(advance(tracker, pipe, 1000.0)) == (0, "cond", True)
    assert tracker.runs == 2


def test_a_run_that_starts_in_the_middle():
    """Image to image: the first steps of the schedule are cut off."""
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert where(advance(tracker, pipe, 500.0)) == (2, "cond", True)
    assert where(advance(tracker, pipe, 250.0)) == (3, "cond", False)


def test_another_scheduler_is_a_new_run():
    tracker, pipe = Tracker(), pipeline()
    advance(tracker, pipe, 1000.0)
    pipe.scheduler = Scheduler()
    pipe.scheduler.set_timesteps(2)
    assert advance(tracker, pipe, 1000.0).new_run
    assert tracker.levels == (1.0, 0.5)


def test_a_forgotten_schedule_makes_the_next_call_a_new_run():
    tracker, pipe = Tracker(), pipeline()
    advance(tracker, pipe, 1000.0)
    tracker.forget_schedule()
    assert advance(tracker, pipe, 1000.0).new_run


@pytest.mark.parametrize("pipe", [None, SimpleNamespace(), SimpleNamespace(scheduler=Scheduler())])
def test_without_a_schedule_every_call_is_outside(pipe):
    tracker = Tracker()
    assert where(advance(tracker, pipe, 1000.0)) == (-1, "cond", True)
    assert advance(tracker, pipe, 1000.0).step == -1
    assert tracker.levels == () and tracker.runs == 1


def test_a_third_call_in_a_step_is_neither_branch():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert [advance(tracker, pipe, 1000.0).branch for _ in range(4)] == ["cond", "uncond", "other", "other"]
    assert advance(tracker, pipe, 750.0).branch == "cond"


def test_two_denoisers_in_turn_are_one_run():
    tracker, pipe = Tracker(), pipeline(counts=False)
    found = [
        where(advance(tracker, pipe, timestep, component=name))
        for timestep, name in ((1000.0, "transformer"), (750.0, "transformer_2"), (500.0, "transformer_2"))
        for _ in range(2)
    ]
    assert found == [
        (0, "cond", True), (0, "uncond", False), (1, "cond", False), (1, "uncond", False), (2, "cond", False),
        (2, "uncond", False),
    ]  # fmt: skip


# ---- batched guidance


def batched(tracker, pipe, timestep, x) -> str:
    return advance(tracker, pipe, timestep, guidance="batched", x=x).branch


def test_a_batched_pair_is_recognised_by_its_latents():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert [batched(tracker, pipe, t, latents(2, paired=True)) for t in (1000.0, 750.0, 500.0)] == [
        "both"
    ] * 3


def test_different_latents_are_no_pair():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert [batched(tracker, pipe, t, latents(2)) for t in (1000.0, 750.0)] == ["cond"] * 2


def test_an_odd_batch_is_no_pair():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert batched(tracker, pipe, 1000.0, torch.ones(3, 3)) == "cond"


def test_the_pipeline_may_say_that_there_is_no_guidance():
    tracker, pipe = Tracker(), pipeline(counts=False, do_classifier_free_guidance=False)
    assert batched(tracker, pipe, 1000.0, torch.ones(2, 3)) == "cond"


@pytest.mark.parametrize(("scale", "branch"), [(1.0, "cond"), (0, "cond"), (6.0, "both"), (None, "both")])
def test_a_guidance_scale_says_the_same(scale, branch: str):
    tracker, pipe = Tracker(), pipeline(counts=False, guidance_scale=scale)
    assert batched(tracker, pipe, 1000.0, torch.ones(2, 3)) == branch


def test_equal_noise_by_chance_is_found_out_at_the_next_step():
    """Two samples of one seed without guidance are equal only until their prompts have worked."""
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert batched(tracker, pipe, 1000.0, latents(1, paired=True)) == "both"
    assert batched(tracker, pipe, 750.0, latents(2)) == "cond"
    assert batched(tracker, pipe, 500.0, latents(1, paired=True)) == "cond"  # and it stays so for the run


def test_a_pair_is_believed_after_two_steps_of_a_run_and_asked_again_in_the_next():
    tracker, pipe = Tracker(), pipeline(counts=False)
    for timestep in (1000.0, 750.0):
        assert batched(tracker, pipe, timestep, latents(1, paired=True)) == "both"
    assert batched(tracker, pipe, 500.0, latents(2)) == "both"  # believed: no comparison on the device
    pipe.scheduler.set_timesteps(4)
    assert batched(tracker, pipe, 1000.0, latents(2)) == "cond"


def test_guidance_that_ends_in_the_middle_changes_the_batch():
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert [batched(tracker, pipe, t, latents(1, paired=True)) for t in (1000.0, 750.0)] == ["both"] * 2
    assert batched(tracker, pipe, 500.0, latents(1)) == "cond"


def test_a_second_batched_call_of_a_step_is_neither_branch():
    """Skip-layer guidance calls the model once more with one half."""
    tracker, pipe = Tracker(), pipeline(counts=False)
    assert batched(tracker, pipe, 1000.0, latents(1, paired=True)) == "both"
    assert batched(tracker, pipe, 1000.0, latents(1)) == "other"
