"""Dense in its fastest ordinary form: the dtype and, where asked for or on a GPU, compiled blocks."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel import api, compat
from dit_accel.bench.attention import check_attention
from dit_accel.bench.work import denoisers_of
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.generate import generate, steps_of
from dit_accel.inventory import describe
from dit_accel.loading import Model, pick_device

DENSE = ("auto", "eager", "compiled")
TRIAL_STEPS = 3  # dense: every step does the same work


@dataclass(frozen=True)
class Form:
    """How every column runs."""

    dtype: str
    compiled: bool = False
    attention: str = "model"  # of SERVED_BY

    def __str__(self) -> str:
        return f"{self.dtype}, {'compiled blocks' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Wanted:
    """What was asked of the form; "auto" is measured."""

    dense: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "model"

    def __post_init__(self) -> None:
        if self.dense not in DENSE:
            raise BadUsage(
                f"asked for --dense {self.dense}; it is one of {', '.join(DENSE)}. Give one of them."
            )
        check_attention(self.attention)

    def candidates(self, own: str | None) -> list[Form]:
        """The forms to choose from; `own` is the dtype that the model's folder states."""
        on_cpu = pick_device(self.device).type == "cpu"
        known = own if self.dtype == "auto" and own else self.dtype
        # an accelerator computes bfloat16 several times faster than float32; a CPU may do either
        both = ["float32", "bfloat16"] if on_cpu else ["bfloat16"]
        dtypes = both if known == "auto" else [known]
        kinds = {"eager": [False], "compiled": [True], "auto": [False] if on_cpu else [False, True]}
        return [Form(dtype, compiled, self.attention) for dtype in dtypes for compiled in kinds[self.dense]]


Load = Callable[[str], tuple[Model, dict[str, Any]]]  # a dtype -> the model in it, and its call's arguments


def fastest(
    forms: Sequence[Form], load: Load, job: Callable[[Model], Job], say: Callable[[str], None]
) -> tuple[Form, Model, dict[str, Any]]:
    """The fastest form by a few steps each, and the model in it; where there is no choice nothing runs."""
    model, arguments = load(forms[0].dtype)
    if len(forms) == 1:
        return forms[0], model, arguments
    loaded, seconds = forms[0].dtype, {}
    for form in forms:
        if form.dtype != loaded:
            loaded, (model, arguments) = form.dtype, _reload(load, form.dtype)
        seconds[form] = _seconds_of_a_step(model, arguments, job(model), form)
    best = min(seconds, key=lambda form: seconds[form])
    told = "; ".join(f"{form}: {1000 * spent:.0f} ms" for form, spent in seconds.items())
    say(f"dense takes, for a step, {told}. All columns run in {best}.")
    if best.dtype != loaded:
        model, arguments = _reload(load, best.dtype)
    return best, model, arguments


def _reload(load: Load, dtype: str) -> tuple[Model, dict[str, Any]]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return load(dtype)


def _seconds_of_a_step(model: Model, arguments: Mapping[str, Any], job: Job, form: Form) -> float:
    steps = min(TRIAL_STEPS, steps_of(model, arguments))
    few = {**arguments, "num_inference_steps": steps}
    with blocks_compiled(model, form.compiled):
        spent = [generate(model, job.prompt, few, job.seed).stages["denoising"] for _ in range(3)]
    return min(spent[1:]) / steps  # the first warms up


@contextmanager
def blocks_compiled(model: Model, active: bool) -> Iterator[None]:
    """Blocks compiled one by one, beneath what is switched on; plain again afterwards.

    Entering it again costs nothing: torch keeps the code that it has made.
    """
    if not active:
        yield
        return
    api.compile(model.pipe)
    try:
        yield
    finally:
        assert model.family is not None  # `api.compile` refuses unknown families
        for name, denoiser in denoisers_of(model.pipe, model.family).items():
            for path in describe(name, denoiser, model.family).blocks:
                for part in denoiser.get_submodule(path).modules():
                    compat.set_compiled_call(part, None)
