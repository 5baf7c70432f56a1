"""A small training of a HarmoniCa router in a process: `python harmonica_worker.py FOLDER STEPS`."""

import sys
from functools import partial
from pathlib import Path

import torch

from dit_accel import loading
from dit_accel.registry import FAMILIES
from dit_accel.testing import TINY
from dit_accel.train.harmonica.ascent import DualAscent
from dit_accel.train.harmonica.objective import Costs, Objective, Rules
from dit_accel.train.harmonica.router import Router
from dit_accel.train.harmonica.student import Student
from dit_accel.train.harmonica.trajectories import Trajectories
from dit_accel.train.loop import LoopConfig, train

SITES = ("blocks.0.attn1", "blocks.0.ffn")
STEPS = 4  # of the sampler


def trained(folder: Path, steps: int, choices: int = 3, ended=lambda: False) -> Router:
    """A router after so many steps of two trajectories each; lambda is found anew at every second one."""
    pipe = TINY["wan"].build(complete=True, layers=1)
    model = loading.Model("tiny", pipe, FAMILIES.get("WanTransformer3DModel"), {}, True)
    arguments = {
        "num_inference_steps": STEPS, "height": 16, "width": 32, "num_frames": 5, "guidance_scale": 4.0
    }  # fmt: skip
    student = Student(pipe.transformer, SITES)
    router = Router(SITES, STEPS, choices)
    costs = Costs(torch.tensor([[3.0, 0.1, 0.2], [1.0, 0.1, 0.2]]) / 16, 0.6) if choices > 1 else None
    follow = Trajectories(model, model.family, student, arguments)
    objective = Objective(follow, ["a red ring", "a blue disc"], Rules(regenerate=2), costs, accumulate=2)
    config = LoopConfig(
        folder, steps, 0.2, warmup=0, cooldown=0, decay=0.0, clip=float("inf"), save_every=1, log_every=1,
        precision="no", accumulate=2, on_cpu=True, plot=False,
    )  # fmt: skip
    with student.attached():
        train(router, objective.loss, config, make_optimizer=partial(DualAscent, rate=1.0), ended=ended)
    return router


if __name__ == "__main__":
    trained(Path(sys.argv[1]), int(sys.argv[2]))
