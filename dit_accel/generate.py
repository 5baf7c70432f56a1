"""One sample from a pipeline: its call arguments, the call, the frames and where the time went."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_accel.errors import BadUsage, DitAccelError
from dit_accel.loading import Model
from dit_accel.peak import Peak, peak_memory
from dit_accel.stages import OnStep, stages

# options of the command line -> arguments of a pipeline's call; guidance is named by the family
OPTIONS = {
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "height": "height",
    "width": "width",
    "num_frames": "num_frames",
    "image": "image",
}


@dataclass(frozen=True)
class Sample:
    """What one call of a pipeline gave and cost."""

    frames: np.ndarray  # [F, H, W, 3] in [0, 1]; an image is one frame
    seconds: float
    stages: Mapping[str, float]  # seconds by stage
    peak: Peak


def call_arguments(model: Model, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's call arguments: what was asked, over the folder's generation.json."""
    accepts = inspect.signature(model.pipe.__call__).parameters
    guidance = model.family.guidance_argument if model.family else "guidance_scale"
    names = OPTIONS | {"guidance": guidance}
    given = {names[option]: value for option, value in asked.items() if value is not None}
    for option, argument in names.items():
        if argument in given and argument not in accepts:
            raise BadUsage(
                f"asked for --{option.replace('_', '-')} {given[argument]}; "
                f"{type(model.pipe).__name__} takes no {argument}. Leave the option out."
            )
    # a folder writes the guidance strength as "guidance_scale", whatever its pipeline calls it
    stored = {
        (guidance if name == "guidance_scale" else name): value for name, value in model.defaults.items()
    }
    arguments = {name: value for name, value in stored.items() if name in accepts} | given
    if guidance == "true_cfg_scale" and not arguments.get("negative_prompt"):
        arguments["negative_prompt"] = " "  # without one these pipelines leave guidance out
    _check_required(model, accepts, arguments)
    return arguments


def _check_required(
    model: Model, accepts: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]
) -> None:
    """Some pipelines start from more than text; say so before the work."""
    required = [
        name
        for name, each in accepts.items()
        if each.default is each.empty and each.kind < each.VAR_POSITIONAL
    ]
    missing = [name for name in required if name not in arguments and name != "prompt"]
    if missing:
        option = " Give --image FILE." if missing == ["image"] else " Call it from Python."
        raise BadUsage(
            f"asked to generate from text with {type(model.pipe).__name__}; "
            f"it also needs {', '.join(missing)}.{option}"
        )


def steps_of(model: Model, arguments: Mapping[str, Any]) -> int:
    """Denoising steps that a call with these arguments takes."""
    default = inspect.signature(model.pipe.__call__).parameters["num_inference_steps"].default
    return int(arguments.get("num_inference_steps", default))


def generate(
    model: Model, prompt: str, arguments: Mapping[str, Any], seed: int = 0, on_step: OnStep | None = None
) -> Sample:
    """Run the pipeline once. The noise is drawn on the CPU: a seed means the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    started = False

    def count(done: int, total: int) -> None:
        nonlocal started
        started = True
        if on_step is not None:
            on_step(done, total)

    with peak_memory() as peak:
        try:
            with stages(model.pipe, count) as watch:
                result = model.pipe(prompt=prompt, generator=generator, output_type="np", **arguments)
        except ValueError as error:
            if started or isinstance(error, DitAccelError):
                raise
            shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise BadUsage(
                f"asked for {shown or 'the defaults'}; {type(model.pipe).__name__} refused: {error} "
                "Change the argument it names."
            ) from error
    return Sample(frames_of(result), watch.total, dict(watch.spent), peak)


def frames_of(result: Any) -> np.ndarray:
    """The first sample's frames [F, H, W, 3], float in [0, 1], of any pipeline's output."""
    if hasattr(result, "frames"):
        frames = np.asarray(result.frames[0])
    elif hasattr(result, "images"):
        frames = np.asarray(result.images[0])
    else:
        raise DitAccelError(
            f"asked for frames; {type(result).__name__} has neither frames nor images. "
            "Use a text to video or text to image pipeline."
        )
    frames = frames[None] if frames.ndim == 3 else frames  # [F, H, W, 3]
    if not np.isfinite(frames).all():
        raise DitAccelError(
            "asked for frames; the pipeline gave values that are not finite. Try another --dtype: bfloat16 "
            "reaches further than float16."
        )
    return frames.astype(np.float32, copy=False)
