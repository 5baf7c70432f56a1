"""What a GPU can verify and measure, best first, in slices of at most ten minutes, without a network.

python scripts/gpu_suite.py                       every slice, each for --limit seconds at most
python scripts/gpu_suite.py contract models       only these
python scripts/gpu_suite.py --rehearse            the same path on a CPU with tiny models; keeps nothing

contract  bit-equality, undo, repeatability and finite output of every tiny pipeline on the device
toys      trained toys: dense against every recipe made for them, time and quality
models    real sizes, random weights: time and memory of dense, neutral and reuse; no quality is claimed
attention        block_attention in Triton: every case of its tests, long sequences, against float64
attention-tune   its fastest tiles for each head width, to be written into triton_configs.json
attention-bench  its TFLOP/s at 32k tokens beside cuDNN, flash, flex_attention and fastvideo-kernel
attention-break-even  up to which density it beats dense, written into break_even.json; after `cuda`
mix              history_mix in Triton: every case of its tests, and its share of a copy's bandwidth
cuda             block_attention's Hopper kernel: the same checks; writes what lets `auto` choose it
cuda-tune        its fastest number of stages, to be written into cuda_builds.py
cuda-bench       its TFLOP/s, beside the same rivals and Triton

--out takes lines for docs/results. The exit status is 1 when a check failed; a slice that ran out of time
says what it left out. Only the rehearsal runs with the tests: a GPU without lines in docs/results is a GPU on
which this has never run.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import dit_accel
from dit_accel import results
from dit_accel.compare import Options, compare
from dit_accel.families import family_of
from dit_accel.generate import call_arguments
from dit_accel.loading import Place, load
from dit_accel.machine import device_name, versions
from dit_accel.peak import peak_memory
from dit_accel.prompts import jobs
from dit_accel.recipe import Recipe, list_recipes
from dit_accel.testing import TINY, TinyPipeline

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, its checkout is not

from dit_accel_kernels import verified  # noqa: E402
from dit_accel_kernels.block_attention.break_even import SHIPPED  # noqa: E402
from scripts import gpu_attention, gpu_cuda, gpu_mix  # noqa: E402

STEPS = 12  # over the limit under which reuse is refused (dit_accel.plan.FEW_STEPS)


@dataclass(frozen=True)
class RealSize:
    """A published model's denoiser with random weights, at its usual size."""

    name: str
    case: str  # the tiny pipeline of the same classes
    config: dict[str, Any]  # of the denoiser; what is not named is the class's default
    text: tuple[int, int]  # tokens, width
    size: tuple[int, int, int]  # height and width in pixels, frames


WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
COGVIDEOX_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
PIXART_SIGMA = {
    "out_channels": 8,
    "sample_size": 128,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}
REAL_SIZES = (
    RealSize("wan2.1-t2v-1.3b", "wan", WAN_1_3B, (512, 4096), (480, 832, 81)),
    RealSize("pixart-sigma", "pixart_sigma", PIXART_SIGMA, (300, 4096), (1024, 1024, 1)),
    RealSize("cogvideox-5b", "cogvideox", COGVIDEOX_5B, (226, 4096), (480, 720, 49)),
    RealSize("qwen-image", "qwen_image", {}, (64, 3584), (1024, 1024, 1)),
    RealSize("wan2.1-t2v-14b", "wan", {}, (512, 4096), (480, 832, 33)),
)


@dataclass
class Suite:
    """One run of the suite: where, how long, and what came out."""

    device: torch.device
    limit: float  # seconds for a slice
    rehearse: bool = False
    backend: str = "triton"  # of block_attention, for the slices that are about one
    verified: Path = verified.FILE  # where a slice that proves a kernel says so
    break_even: Path = SHIPPED  # where the densities go up to which a backend beats dense
    lines: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, slices: list[str]) -> None:
        """Each slice until it is done or its time is over; a case that fails does not stop the next."""
        for name in slices:
            start = time.perf_counter()
            for label, case in SLICES[name](self):
                if time.perf_counter() - start > self.limit:
                    say(f"{name}: time is over, left out {label} and what follows")
                    break
                try:
                    say(f"{name}: {label}: {case()}")
                except Exception as error:  # the next case may still tell something; the exit status stays 1
                    self.failures.append(f"{name}: {label}: {type(error).__name__}: {error}")
                    say(traceback.format_exc())
                self.free()
            say(f"{name}: {time.perf_counter() - start:.0f} s")

    def free(self) -> None:
        """The next case starts with an empty device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def made_now(self) -> dict[str, str]:
        """Commit and date."""
        return made_now()

    def record(self, **line: Any) -> None:
        """Keep a line for docs/results."""
        self.lines.append(line | {"device": device_name(), "versions": versions(), **made_now()})


Case = tuple[str, Callable[[], str]]


def contract(suite: Suite) -> Iterator[Case]:
    """Every tiny pipeline on the device: what the tests promise on a CPU."""
    for name, case in TINY.items():
        yield name, lambda case=case: check_contract(case, suite.device)


def check_contract(case: TinyPipeline, device: torch.device) -> str:
    """Neutral and restored output are bit-equal to plain; reuse happens, repeats exactly and stays finite."""
    pipe = case.build().to(device)

    def sample() -> torch.Tensor:
        return case.call(moved(pipe, device), steps=STEPS)  # pyright: ignore[reportArgumentType]

    plain = sample()
    with dit_accel.accelerated(pipe, "neutral", strict=False):
        require(torch.equal(sample(), plain), "neutral is not bit-equal")
    handle = dit_accel.accelerate(pipe, reuse_recipe(pipe))
    first, second = sample(), sample()
    report = handle.report()
    handle.restore()
    require(bool(torch.isfinite(first).all()), "output is not finite")
    require(torch.equal(first, second), "the same seed gave two results")
    require(report.counters.get("reuse", 0) > 0, f"nothing was reused: {report.counters}")
    require(torch.equal(sample(), plain), "restored output is not bit-equal")
    return f"bit-equal, undone, {report.counters}"


def toys(suite: Suite) -> Iterator[Case]:
    """Every recipe made for a toy, against dense and against fewer steps."""
    for name in (name for name in list_recipes() if name.startswith("toys/")):
        yield name, lambda name=name: measure_toy(suite, Recipe.load(name))


def measure_toy(suite: Suite, recipe: Recipe) -> str:
    """Time and quality on held-out prompts, through the same code as `dit-accel compare`."""
    model = load(recipe.made_for.model or "", Place(device=str(suite.device)))
    arguments = call_arguments(model, {"steps": STEPS} if suite.rehearse else {})
    tasks = jobs(model, None, 1 if suite.rehearse else 4, 0)
    measured = compare(model, recipe, tasks, arguments, Options(rival_steps="auto")).as_dict()
    suite.lines += results.lines_from(measured, **made_now())
    return f"{measured['speedup']:.2f}x, PSNR {measured['psnr']:.1f} dB"


def models(suite: Suite) -> Iterator[Case]:
    """Real sizes, random weights."""
    for real in REAL_SIZES:
        yield real.name, lambda real=real: measure_model(suite, real)


def measure_model(suite: Suite, real: RealSize) -> str:
    """Seconds and bytes of one short run: dense, neutral, reuse and the recipes that ship for this model."""
    pipe = tiny_of(real) if suite.rehearse else real_size(real, suite.device)
    arguments = arguments_of(real, suite)
    # a rehearsal's model has fewer blocks than the sites of a shipped recipe
    shipped = [name for name in list_recipes() if name.startswith(f"{real.name}/") and not suite.rehearse]
    timed = {"dense": timed_run(pipe, arguments, suite, None)}
    for recipe in (Recipe.neutral(), reuse_recipe(pipe), *map(Recipe.load, shipped)):
        timed[f"dit_accel:{recipe.name}"] = timed_run(pipe, arguments, suite, recipe)
    height, width, frames = real.size
    shape = {"height": height, "width": width, "frames": frames, "steps": STEPS}
    for name, (seconds, peak, counters) in timed.items():
        row = {"name": name, "seconds": seconds, "speedup": timed["dense"][0] / seconds, "peak_bytes": peak}
        suite.record(
            what="model", model=f"{real.name} (random weights)", shape=shape, counters=counters, **row
        )
    return ", ".join(f"{name} {seconds:.2f} s" for name, (seconds, *_) in timed.items())


def timed_run(
    pipe: Any, arguments: dict[str, Any], suite: Suite, recipe: Recipe | None
) -> tuple[float, int | None, dict[str, int]]:
    """A short warm-up, then one run: seconds, peak bytes, what the recipe did."""
    handle = dit_accel.accelerate(pipe, recipe) if recipe else None
    try:
        with warnings.catch_warnings(action="ignore"):  # two steps are too few to reuse anything
            pipe(**arguments | {"num_inference_steps": 2})
        with peak_memory() as peak:
            start = time.perf_counter()
            pipe(**arguments)
            if suite.device.type == "cuda":
                torch.cuda.synchronize(suite.device)
            seconds = time.perf_counter() - start
        return seconds, peak.bytes_, dict(handle.report().counters) if handle else {}
    finally:
        if handle:
            handle.restore()


def real_size(real: RealSize, device: torch.device) -> DiffusionPipeline:
    """The tiny pipeline with a denoiser of the published size, in bfloat16 on the device."""
    pipe = TINY[real.case].build(layers=1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            denoiser = type(pipe.transformer)(**real.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.register_modules(transformer=denoiser)
    return pipe


def tiny_of(real: RealSize) -> DiffusionPipeline:
    """For a rehearsal: the tiny pipeline as it is."""
    return TINY[real.case].build()


def arguments_of(real: RealSize, suite: Suite) -> dict[str, Any]:
    """The call's arguments: random prompt embeddings, latents out."""
    case = TINY[real.case]
    if suite.rehearse:
        texts = [case.text(1, 0, branch) for branch in (0, 1)]
    else:
        shape = (1, *real.text)
        texts = [torch.randn(shape, dtype=torch.bfloat16, device=suite.device) for _ in range(2)]
    height, width, frames = case.size if suite.rehearse else real.size
    arguments = case.embeds(texts[0], texts[1]) | {case.guidance_argument: case.guidance}
    if "max_sequence_length" in arguments:
        arguments["max_sequence_length"] = texts[0].shape[1]
    arguments |= {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "latent"}
    if frames > 1:
        arguments["num_frames"] = frames
    return {name: on(value, suite.device) for name, value in arguments.items()}


def reuse_recipe(pipe: Any) -> Recipe:
    """All blocks but the outer two reused at every second step after the first quarter."""
    family = family_of(pipe.transformer)
    assert family is not None, "tiny pipelines are of known families"
    name = family.blocks[0]
    last = len(pipe.transformer.get_submodule(name)) - 2
    letters = "".join("R" if step >= STEPS // 4 and step % 2 else "C" for step in range(STEPS))
    table = {
        "schema": 1,
        "made_for": {"family": family.name, "steps": STEPS},
        "choices": {"C": {"method": "compute"}, "R": {"method": "reuse"}},
        "timeline": {"both": {f"{name}.1-{last}": letters}},
    }
    return Recipe.from_dict(table, "reuse every second step")


def moved(pipe: Any, device: torch.device) -> Callable[..., Any]:
    """A call of the pipeline that takes its tensors to the device first."""
    return lambda **arguments: pipe(**{name: on(value, device) for name, value in arguments.items()})


def on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def made_now() -> dict[str, str]:
    """Commit and date for a line."""
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "date": datetime.now(UTC).date().isoformat()}


def say(text: str) -> None:
    print(text, flush=True)


SLICES: dict[str, Callable[[Suite], Iterator[Case]]] = {
    "contract": contract,
    "attention": gpu_attention.correct,
    "mix": gpu_mix.slice_,
    "attention-tune": gpu_attention.tune,
    "attention-bench": gpu_attention.bench,
    "cuda": gpu_cuda.correct,
    "cuda-tune": gpu_cuda.tune,
    "cuda-bench": gpu_cuda.bench,
    "attention-break-even": gpu_attention.break_even,
    "toys": toys,
    "models": models,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=f"of {', '.join(SLICES)}; default: all")
    parser.add_argument("--limit", type=float, default=540, help="seconds for a slice, default 540")
    parser.add_argument(
        "--out", type=Path, help="file for the JSON lines, to be appended to docs/results/<device>.jsonl"
    )
    parser.add_argument("--verified", type=Path, default=verified.FILE, help="file for records of proof")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU with tiny models")
    given = parser.parse_args(argv)
    if unknown := set(given.slices) - set(SLICES):
        parser.error(f"no slice {', '.join(sorted(unknown))}; there are {', '.join(SLICES)}")
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device here; --rehearse runs the same path on the CPU")
    if given.rehearse and given.out:
        parser.error("a rehearsal measures nothing that may be kept; leave out --out")
    suite = Suite(torch.device("cpu" if given.rehearse else "cuda"), given.limit, given.rehearse)
    suite.verified = given.verified
    suite.run(given.slices or list(SLICES))
    if given.out:
        given.out.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in suite.lines))
    say("\n".join(["FAILED", *suite.failures]) if suite.failures else "all slices passed")
    return int(bool(suite.failures))


if __name__ == "__main__":
    raise SystemExit(main())
