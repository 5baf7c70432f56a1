"""What this machine offers: libraries, devices, kernel backends, models. What is missing, and why."""

import importlib
import os
import pkgutil
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from dit_accel.machine import LIBRARIES, device_name, processor, version_of
from dit_accel.recipe import list_recipes
from dit_accel.recipe_names import RECIPES, TOYS

# what an optional library is for, by the name of its extra or its own
PURPOSE = {
    "peft": "LoRA weights",
    "sentencepiece": "checkpoints that ship only a spiece.model tokenizer (CogVideoX, PixArt)",
    "torchao": "its quantized linears, as a rival",
    "metrics": "LPIPS and similar metrics",
    "plot": "Pareto plots",
    "rivals": "benchmarks against it",
}
# what a backend's being usable does not say
USABLE = {"flex": "usable: taken where the C backend is not, for calls without LSE; compiles each shape once"}
DEVELOPMENT = {"test", "dev"}  # extras that only work on dit_accel itself needs


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    part: str
    name: str
    fine: bool | None  # False: needed and missing; None: optional and missing
    said: str  # the version, or why it is missing and what to do


def examine() -> list[Finding]:
    """Everything, in the order in which it is shown."""
    return [*_libraries(), *_devices(), *_kernels(), *_models()]


def _libraries() -> Iterator[Finding]:
    try:
        needed = [Requirement(line) for line in requires("dit_accel") or ()]
    except PackageNotFoundError:
        yield Finding(
            "Libraries", "dit_accel", None, "runs from a source tree; pip install -e . makes it complete"
        )
        needed = [Requirement(name) for name in LIBRARIES if name != "dit_accel"]
    for requirement in needed:
        extra = _extra(requirement)
        if extra not in DEVELOPMENT:
            yield _library(requirement, extra)
    found = version_of("triton")
    yield Finding(
        "Libraries", "triton", bool(found) or None, found or "comes with CUDA builds of torch: GPU kernels"
    )


def _extra(requirement: Requirement) -> str | None:
    """The extra that brings a requirement; None for the ones everybody gets."""
    marker = str(requirement.marker or "")
    return marker.partition("extra ==")[2].strip().strip("'\"") or None


def _library(requirement: Requirement, extra: str | None) -> Finding:
    found = version_of(requirement.name)
    wrong = found is not None and not requirement.specifier.contains(found, prereleases=True)
    missing = False if extra is None else None
    purpose = f" for {PURPOSE.get(extra, extra)}" if extra else ""
    command = f"pip install 'dit_accel[{extra}]'" if extra else f"pip install '{requirement}'"
    if found is None:
        return Finding("Libraries", requirement.name, missing, f"not installed{purpose}: {command}")
    if wrong:
        return Finding(
            "Libraries",
            requirement.name,
            missing,
            f"{found}, but {requirement.specifier} is needed: {command}",
        )
    return Finding("Libraries", requirement.name, True, found)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("Devices", "processor", True, f"{processor()}, {torch.get_num_threads()} threads for torch")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        count, generation = torch.cuda.device_count(), f"sm_{properties.major}{properties.minor}"
        said = f"{count} x {device_name()}, {memory}, {generation}"
        yield Finding("Devices", "CUDA", True, said)
    else:
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built}, but finds no device or driver"
            if built
            else "torch is built without CUDA"
        )
        yield Finding("Devices", "CUDA", None, why)
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    path = next(filter(None, map(shutil.which, (compiler.split()[0], "cc", "gcc", "clang"))), None)
    yield Finding(
        "Devices", "C compiler", bool(path) or None, path or "none found: the C kernels need one; install gcc"
    )
    yield _ffmpeg()


def _ffmpeg() -> Finding:
    try:
        path = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        return Finding(
            "Devices", "ffmpeg", False, f"mp4 files need it ({error}): pip install 'imageio[ffmpeg]'"
        )
    return Finding("Devices", "ffmpeg", True, path)


def _kernels() -> Iterator[Finding]:
    """Every op with its backends, and why a backend cannot be used here."""
    import dit_accel_kernels
    from dit_accel_kernels.dispatch import backends, why_not

    ops = [each.name for each in pkgutil.iter_modules(dit_accel_kernels.__path__) if each.ispkg]
    for op, name in [(each, name) for each in ops for name in backends(each)]:
        try:
            why = why_not(op, name, **_smallest_call(op))
        except (TypeError, KeyError):  # it looks at other tensors first: nothing else speaks against it
            why = None
        yield Finding("Kernels", f"{op}, {name}", why is None or None, why or USABLE.get(name, "usable"))


def _smallest_call(op: str) -> dict[str, Any]:
    """What to ask a backend about: without tensors it would not get as far as its compiler."""
    if op != "block_attention":
        return {}
    import torch

    from dit_accel_kernels.block_attention import Kind, plan_blocks, starts_of

    q, starts = torch.zeros(1, 1, 1, 32), starts_of(1)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [Kind.ATTEND])
    return {"q": q, "k": q, "v": q, "plan": plan, "lse_wanted": False}


def _models() -> Iterator[Finding]:
    toys = sorted(folder.name for folder in TOYS.glob("*") if (folder / "model_index.json").is_file())
    yield Finding(
        "Models", "toys", bool(toys), ", ".join(f"toys/{name}" for name in toys) or f"none in {TOYS}"
    )
    count = len(list_recipes())
    yield Finding("Models", "recipes", count > 1, f"{count} names in {RECIPES}")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    said = "HF_HUB_OFFLINE is set: only downloaded models load" if offline else "asked when a model is loaded"
    yield Finding("Models", "Hub", None if offline else True, said)
