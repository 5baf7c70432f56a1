"""What routers are trained on: clean latents that the model itself made of prompts, and what it was told.

VORTA trains on latents of video clips; here the pipeline's own results stand for them, so that no data set is
needed. Their latents are kept in files, one for each prompt. What the denoiser is given beside them (text,
masks, positions) is taken from the first step of a call, branch by branch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_accel import compat
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.loading import Model
from dit_accel.search.calls import by_name
from dit_accel.search.subject import call_of
from dit_accel.stages import stages

Arguments = dict[str, Any]  # of a denoiser's forward, by name


@dataclass(frozen=True)
class Sample:
    """One result: `clean` latents [1, ...], and the denoiser's arguments of each branch, cond first."""

    clean: Tensor
    branches: tuple[Arguments, ...]


@dataclass(frozen=True)
class Schedule:
    """The steps of a run: timesteps and noise levels [T], and what a timestep is multiplied by on its way."""

    timesteps: tuple[float, ...]
    levels: tuple[float, ...]
    scale: float


class _Enough(Exception):
    """Leaves the pipeline at its second step."""


def collect(
    model: Model, jobs: Sequence[Job], arguments: Mapping[str, Any], folder: Path | None,
    told: Callable[[int, int], None],
) -> tuple[list[Sample], Schedule]:  # fmt: skip
    """A sample for each prompt, and the schedule they were made on; `told` hears (steps done, all steps).

    Results that are in `folder` already are not made again; without a folder none are, and the first noise
    stands where clean latents would. Raises BadUsage where the latents are not what
    the denoiser takes, as of image-to-video models.
    """
    samples = []
    for number, job in enumerate(jobs):
        file = None if folder is None else folder / f"clean-{number:03d}.safetensors"
        calls, latents = _run(model, job, arguments, file is not None and not file.exists(), told)
        clean = calls[0]["hidden_states"][:1] if file is None else _kept(file, latents)
        clean = clean.to(calls[0]["hidden_states"].device)
        samples.append(Sample(clean, _branches(model, calls, clean)))
    return samples, _schedule(model, samples[0].branches[0])


def _kept(file: Path, latents: Tensor | None) -> Tensor:
    """The latents in a file, which is written whole if they are new."""
    if latents is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.cpu().contiguous()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return load_file(file)["latents"]


def _run(
    model: Model, job: Job, arguments: Mapping[str, Any], whole: bool, told: Callable[[int, int], None]
) -> tuple[list[Arguments], Tensor | None]:
    """The denoiser's arguments at the first step; the latents, where the `whole` run is wanted."""
    calls: list[Arguments] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = by_name(module, args, kwargs)
        first = not calls or torch.equal(given["timestep"], calls[0]["timestep"])
        if first:
            calls.append({name: _copy(value) for name, value in given.items()})
        elif not whole:
            raise _Enough

    hook = model.pipe.transformer.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        with stages(model.pipe, told if whole else None):
            output = model.pipe(**call_of([job], arguments), output_type="latent")
        return calls, output[0]
    except _Enough:
        return calls, None
    finally:
        hook.remove()


def _branches(model: Model, calls: Sequence[Arguments], clean: Tensor) -> tuple[Arguments, ...]:
    """The calls of a step as one call for each branch, of one sample."""
    batched = len(calls) == 1 and calls[0]["hidden_states"].shape[0] == 2
    found = [_half(calls[0], index) for index in (1, 0)] if batched else list(calls)
    shape = found[0]["hidden_states"].shape
    if shape != clean.shape:
        raise BadUsage(
            f"asked to train routers of {model.name}; its denoiser takes {tuple(shape)} and the latents are "
            f"{tuple(clean.shape)}: it starts from more than noise. Use --method ditfastattn."
        )
    return tuple(found)


def _half(value: Any, index: int) -> Any:
    """One half of everything in a batched pair that has its batch of two."""
    if isinstance(value, dict):
        return {name: _half(each, index) for name, each in value.items()}
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == 2:
        return value.chunk(2)[index]
    return value


def _copy(value: Any) -> Any:
    """Pipelines write to some of their tensors in place; the copies are no inference tensors either."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copy(each) for name, each in value.items()}
    return tuple(_copy(each) for each in value) if isinstance(value, tuple) else value


def _schedule(model: Model, first: Arguments) -> Schedule:
    scheduler = model.pipe.scheduler
    timesteps = scheduler.timesteps
    given = float(first["timestep"].flatten()[0])
    levels = compat.noise_levels(scheduler, timesteps)
    return Schedule(tuple(float(t) for t in timesteps), levels, given / float(timesteps[0]))


def noised(scheduler: Any, clean: Tensor, noise: Tensor, time: float) -> tuple[Tensor, float, Tensor]:
    """Noisy latents, their timestep, and what the model should answer; `time` in [0, 1) of the training's.

    Flow matching: x = (1 - t) x0 + t n, answer n - x0. Variance preserving, a the cumulative alpha:
    x = sqrt(a) x0 + sqrt(1 - a) n, answer n, or v = sqrt(a) n - sqrt(1 - a) x0, or x0.
    """
    train = scheduler.config.get("num_train_timesteps", 1000)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or kind == "flow_prediction":
        return (1 - time) * clean + time * noise, time * train, noise - clean
    step = min(int(time * train), train - 1)
    signal, spread = float(alphas[step]) ** 0.5, (1 - float(alphas[step])) ** 0.5
    answers = {"epsilon": noise, "v_prediction": signal * noise - spread * clean, "sample": clean}
    if kind not in answers:
        raise BadUsage(
            f"asked to train routers with {type(scheduler).__name__}; it predicts {kind}, and known are "
            f"flow_prediction, {', '.join(answers)}. Use another scheduler."
        )
    return signal * clean + spread * noise, float(step), answers[kind]
