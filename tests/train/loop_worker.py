"""A small training in a process of its own: `python loop_worker.py FOLDER STEPS ACCUMULATE [KILL_AT_WRITE]`.

With KILL_AT_WRITE the process kills itself, by a signal that no handler sees, in the middle of that write.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dit_accel.train import checkpoint
from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.optimizer import Adam


def fresh() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def loss_of(module: nn.Module, number: int) -> tuple[torch.Tensor, dict[str, float]]:
    x = torch.randn(4, 8)
    error = (module(x) - x.flip(1)).square().mean()
    return error, {"loss": error.item()}


def config_of(folder: Path, steps: int = 12, accumulate: int = 1) -> LoopConfig:
    # a line spans two checkpoints: what it has so far is part of the state
    return LoopConfig(
        folder,
        steps,
        cooldown=4,
        save_every=4,
        log_every=3,
        precision="no",
        accumulate=accumulate,
        plot=False,
    )


def half_written(write: int):
    """`save_file` that dies in the middle of its call number `write`."""
    calls = [0]

    def save(tensors, file, metadata=None):
        save_file(tensors, file, metadata=metadata)
        calls[0] += 1
        if calls[0] == write:
            with open(file, "r+b") as opened:
                opened.truncate(Path(file).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    return save


if __name__ == "__main__":
    if len(sys.argv) > 4:
        checkpoint.save_file = half_written(int(sys.argv[4]))
    # Muon works in bfloat16: there a sum's rounding is no rounding any more
    config = config_of(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
    train(fresh(), loss_of, config, make_optimizer=Adam)
