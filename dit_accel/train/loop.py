"""The training loop of everything that is trained here, under accelerate: resumable, over any processes.

A step of the optimizer sums `accumulate` micro-batches. They are numbered over the whole training, all
randomness of one comes from (seed, number), and the processes share them out: two processes take the steps
that one would have taken, to the rounding of a sum. The state is one file that appears whole
(`checkpoint.py`), so whatever interrupts a training, the same call again ends with the same weights.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from dit_accel.errors import BadUsage, DitAccelError
from dit_accel.train import checkpoint
from dit_accel.train.log import Log, Numbers
from dit_accel.train.optimizer import MovingAverage, MuonAdam, Trainer
from dit_accel.train.plot import plot_losses
from dit_accel.train.progress import Bar, Told
from dit_accel.train.recompute import recompute_blocks

LossOf = Callable[[nn.Module, int], tuple[torch.Tensor, Numbers]]
MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]], float], Trainer]

PRECISIONS = ("no", "bf16")


@dataclass(frozen=True)
class LoopConfig:
    """`steps` in all; the rate rises over `warmup` steps and falls to zero over the last `cooldown` steps."""

    folder: Path
    steps: int
    lr: float = 2e-3
    warmup: int = 30
    cooldown: int = 200
    decay: float = 0.995  # of the moving average of the weights
    clip: float = 1.0  # the largest norm of all gradients together
    save_every: int = 200
    log_every: int = 10
    precision: str = "bf16"  # "no" is float32; float16 would need its loss scaled
    seed: int = 0
    on_cpu: bool = False  # even where there is a GPU
    accumulate: int = 1  # micro-batches of a step, over all processes together
    recompute: bool = False  # activations of blocks are computed again in the backward, to save memory
    plot: bool = True  # loss.png beside the log

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BadUsage(
                f'asked to train in "{self.precision}"; known: {", ".join(PRECISIONS)}. Give one of them.'
            )
        for name in ("steps", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise BadUsage(f"asked to train with {name} {getattr(self, name)}; it must be at least 1.")


def learning_rate(config: LoopConfig, step: int) -> float:
    """Warm-up, constant, linear to zero: more `steps` leave everything before the cool-down as it was."""
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    fall = min(1.0, (config.steps - step) / max(config.cooldown, 1))
    return config.lr * min(rise, fall)


def train(
    module: nn.Module, loss_of: LossOf, config: LoopConfig, on_save: Callable[[int], None] | None = None,
    make_optimizer: MakeOptimizer = MuonAdam, told: Told | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Trains `module` in place up to `config.steps`, from the folder's checkpoint if it has one.

    Returns the steps that are done: fewer than `config.steps` where `ended()` said after a step, in any of
    the processes, that this is enough for now.

    `loss_of(module, number)` gives the mean loss of micro-batch `number`, and what to log; its randomness
    must be torch's or come from `number`. A checkpoint begins with `on_save(step)`, the average in place,
    so what that writes is there whenever the checkpoint is. At the end `module` holds the moving average.
    `told(done, total, numbers)` hears of every step; without it a bar is drawn on a terminal.

    Raises BadUsage where the processes cannot share the micro-batches evenly, and where the folder's
    checkpoint is of another module.
    """
    accelerator = accelerator_of(config)
    module.to(accelerator.device)
    if config.recompute:
        recompute_blocks(module)
    run = _Run(module, config, accelerator, make_optimizer)
    done = first = run.resume()
    losses = accelerator.prepare_model(_Losses(module, loss_of))
    lead = accelerator.is_main_process
    with Bar(first, config.steps, told, lead) as bar:
        for step in range(first, config.steps):
            numbers, done = run.take_step(losses, step), step + 1
            run.log.add(numbers)
            bar.step(done, numbers)
            if done % config.log_every == 0:
                means = _means(accelerator, run.log.take())
                if lead:
                    run.log.write(done, means)
            stop = _means(accelerator, {"ended": float(ended())})["ended"] > 0
            if stop or done % config.save_every == 0 or done == config.steps:
                means = _means(accelerator, run.log.sums)
                if lead:
                    run.save(done, means, on_save)
                    _plot(config, bar)
            if stop:
                break
    run.average.copy_to(module)
    return done


def accelerator_of(config: LoopConfig) -> Accelerator:
    """What runs the loop here: processes as launched, precision as configured; the CPU without a GPU."""
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=config.on_cpu or not torch.cuda.is_available(),
        # a module may have weights that a micro-batch does not use
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if config.accumulate % accelerator.num_processes:
        raise BadUsage(
            f"asked to train with {config.accumulate} micro-batches a step in {accelerator.num_processes} "
            "processes; every process takes as many. Give a multiple of the processes as `accumulate`."
        )
    return accelerator


class _Losses(nn.Module):
    """The loss as the forward of a module: what data parallelism can wrap, whatever of it a loss calls."""

    def __init__(self, module: nn.Module, loss_of: LossOf):
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self, number: int) -> tuple[torch.Tensor, Numbers]:
        return self.loss_of(self.module, number)


class _Run:
    """One training: its weights, their average, the optimizer, and the log."""

    def __init__(
        self, module: nn.Module, config: LoopConfig, accelerator: Accelerator, make_optimizer: MakeOptimizer
    ):
        self.module, self.config, self.accelerator = module, config, accelerator
        self.optimizer = make_optimizer(module.named_parameters(), config.lr)
        self.average = MovingAverage(module, config.decay)
        self.log = Log(config.folder, config.log_every)

    def resume(self) -> int:
        """Takes up the folder's checkpoint; the steps that are done."""
        state = checkpoint.load(self.config.folder, self.module)
        if state is None:
            done, sums = 0, {}
        else:
            self.module.load_state_dict(state.weights, strict=False)
            self.average.load(state.average)
            self.optimizer.load_tensors(state.optimizer, state.lr)
            done, sums = state.done, state.sums
        self.log.resume(done, sums, self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()  # nobody writes what another still reads
        return done

    def take_step(self, losses: nn.Module, step: int) -> Numbers:
        """One step of the optimizer; the means of what this process's micro-batches told."""
        config, accelerator = self.config, self.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        own = range(step * config.accumulate + rank, (step + 1) * config.accumulate, ranks)
        means: Numbers = {}
        for number in own:
            torch.manual_seed((config.seed << 32) + number)
            with accelerator.no_sync(losses) if number != own[-1] else nullcontext():
                with accelerator.autocast():
                    loss, numbers = losses(number)
                accelerator.backward(loss / len(own))
            for key, value in numbers.items():
                means[key] = means.get(key, 0.0) + value / len(own)
        accelerator.clip_grad_norm_(self.module.parameters(), config.clip)
        self.optimizer.step()
        self.module.zero_grad(set_to_none=True)
        self.average.update(self.module, step)
        return means

    def save(self, done: int, sums: Numbers, on_save: Callable[[int], None] | None) -> None:
        """The checkpoint after `done` steps."""
        state = checkpoint.State(
            weights={name: p.detach() for name, p in self.module.named_parameters()},
            average=self.average.weights,
            optimizer=self.optimizer.tensors(),
            done=done,
            lr=self.optimizer.lr,
            sums=sums,
        )
        before = None if on_save is None else partial(self._with_average, partial(on_save, done))
        checkpoint.save(self.config.folder, state, before)

    def _with_average(self, action: Callable[[], None]) -> None:
        weights = {name: p.detach().clone() for name, p in self.module.named_parameters()}
        self.average.copy_to(self.module)
        action()
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(weights[name])


def _plot(config: LoopConfig, bar: Bar) -> None:
    """A training is worth more than its picture: without matplotlib it says so and goes on."""
    try:
        if config.plot:
            plot_losses(config.folder)
    except DitAccelError as error:
        bar.say(str(error))


def _means(accelerator: Accelerator, numbers: Numbers) -> Numbers:
    """The means over all processes; the keys are those of each of them."""
    if accelerator.num_processes == 1 or not numbers:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(values, reduction="mean")
    assert isinstance(total, torch.Tensor)
    return dict(zip(numbers, total.tolist(), strict=True))
