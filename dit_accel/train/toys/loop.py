"""One training loop for all toys, under accelerate: warm-up, constant, linear end; resumes identically."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dit_accel.train.toys.optimizer import MovingAverage, MuonAdam

LossOf = Callable[[nn.Module, int], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True)
class LoopConfig:
    """`steps` in all; the rate rises over `warmup` steps and falls to zero over the last `cooldown` steps."""

    folder: Path
    steps: int
    lr: float = 2e-3
    warmup: int = 30
    cooldown: int = 200
    decay: float = 0.995
    clip: float = 1.0
    save_every: int = 200
    log_every: int = 10
    precision: str = "bf16"
    seed: int = 0
    accumulate: int = 1


def learning_rate(config: LoopConfig, step: int) -> float:
    """Warm-up, constant, linear to zero: more `steps` leave everything before the cool-down as it was."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = min(1.0, (config.steps - step) / max(config.cooldown, 1))
    return config.lr * min(rise, fall)


def train(
    module: nn.Module, loss_of: LossOf, config: LoopConfig, on_save: Callable[[int], None] | None = None
) -> None:
    """Trains `module` in place up to `config.steps`, from the folder's checkpoint if it has one.

    All randomness of a step comes from (seed, step), so a run that was interrupted and resumed gives the
    weights of one that was not. At the end `module` holds the moving average. After each checkpoint
    `on_save(step)` is called with the average in place.
    """
    accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    optimizer = MuonAdam(module.named_parameters(), config.lr)
    prepared = accelerator.prepare_model(module)
    average = MovingAverage(module, config.decay)
    first = _load(config.folder, module, optimizer, average)
    config.folder.mkdir(parents=True, exist_ok=True)
    began, sums = time.perf_counter(), {}
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for part in range(config.accumulate):
            number = step * config.accumulate + part
            torch.manual_seed(
                (config.seed << 32) + number * accelerator.num_processes + accelerator.process_index
            )
            with accelerator.autocast():
                loss, numbers = loss_of(prepared, number)
            accelerator.backward(loss / config.accumulate)
        accelerator.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        module.zero_grad(set_to_none=True)
        average.update(module, step)
        for key, value in numbers.items():
            sums[key] = sums.get(key, 0.0) + value / config.log_every
        done = step + 1
        if done % config.log_every == 0:
            _log(config, done, time.perf_counter() - began, sums)
            sums = {}
        if accelerator.is_main_process and (done % config.save_every == 0 or done == config.steps):
            _save(config.folder, module, optimizer, average, done)
            if on_save is not None:
                _with_average(module, average, partial(on_save, done))
    average.copy_to(module)


def _with_average(module: nn.Module, average: MovingAverage, action: Callable[[], None]) -> None:
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    average.copy_to(module)
    action()
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(weights[name])


def _save(folder: Path, module: nn.Module, optimizer: MuonAdam, average: MovingAverage, done: int) -> None:
    """One file holds all that a resume needs, so that an interruption cannot leave halves of two steps."""
    weights = {name: p.detach().contiguous() for name, p in module.named_parameters()}
    means = {name: w.contiguous() for name, w in average.weights.items()}
    parts = {"weights": weights, "average": means, "optimizer": optimizer.tensors()}
    state = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    save_file(state, folder / "state.tmp", metadata={"done": str(done), "lr": repr(optimizer.lr)})
    (folder / "state.tmp").replace(folder / "state.safetensors")
    save_file(weights, folder / "weights.safetensors")
    save_file(means, folder / "average.safetensors")


def _load(folder: Path, module: nn.Module, optimizer: MuonAdam, average: MovingAverage) -> int:
    if not (folder / "state.safetensors").exists():
        return 0
    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
    with safe_open(folder / "state.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no dict
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
        metadata = file.metadata()
    module.load_state_dict(parts["weights"], strict=False)
    average.weights = parts["average"]
    optimizer.load_tensors(parts["optimizer"], float(metadata["lr"]))
    return int(metadata["done"])


def _log(config: LoopConfig, done: int, seconds: float, numbers: dict[str, float]) -> None:
    line = {"step": done, "seconds": round(seconds, 1)} | {
        key: round(value, 5) for key, value in numbers.items()
    }
    with open(config.folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def describe(config: LoopConfig) -> dict:
    """The configuration as JSON-ready values, for a run's folder."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}
