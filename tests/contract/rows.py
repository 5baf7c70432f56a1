"""The contract table: every method by one row, the pipelines it is held to, and how a test runs a pair.

A new method enters with one row in ROWS; a new family with one name in PIPELINES.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import dit_accel
from dit_accel.recipe import Recipe
from dit_accel.run_report import Report
from dit_accel.testing import TINY

STEPS = 9  # one more than what counts as few
LAYERS = 3

HEAD = """
schema = 1
[made_for]
steps = 9
[choices]
F = {{ method = "full" }}
w = {{ method = "window", radius = [0, 1, 1], brick = [1, 2, 2] }}
x = {{ method = "window", radius = [0, 1, 1], mask = "tokens" }}
a = {{ method = "arrow", radius = [0, 1, 1], brick = [1, 2, 2] }}
b = {{ method = "brick", extent = [0, 0, [0, 0.4]], brick = [1, 2, 2] }}
k = {{ method = "coreset", bucket = [1, 2, 2] }}
q = {{ method = "coreset", bucket = [1, 2, 2], queries = "selected", keys = "all" }}
p = {{ method = "coreset", bucket = [1, 3, 2], queries = "selected", keys = "as_queries", reweight = false }}
t = {{ method = "tail", extent = [0, 0, 1], brick = [1, 2, 2], max_age = 2 }}
e = {{ method = "residual", radius = [0, 1, 0], brick = [1, 2, 2], max_age = 2 }}
r = {{ method = "reuse", max_age = 2 }}
R = {{ method = "reuse", max_age = 2, gates = "stored" }}
s = {{ method = "share_branch", max_age = 2 }}
c = {{ method = "share_branch", difference = false }}
P = {{ method = "forecast", order = 1, max_age = 2 }}
Q = {{ method = "forecast", order = 2, max_age = 2, gates = "current" }}
z = {{ method = "skip" }}
L = {{ method = "fitted", max_age = 9 }}
d = {{ method = "share_branch", order = 1, max_age = 2 }}
C = {{ method = "compute" }}
"""


@dataclass(frozen=True)
class Row:
    """One use of a method: the tables of a recipe in which {blocks} and {attn} stand for a family's names."""

    name: str
    tables: str
    method: str  # the counter that must rise
    exact: bool = False
    stores: bool = True
    needs_guidance: bool = False
    needs_grid: bool = False
    branches_apart: bool = False


def _attention(letters: str) -> str:
    return f'[attention.both]\n"{{blocks}}.*.{{attn}}" = ["{letters}"]\n'


def _timeline(site: str, letters: str) -> str:
    return f'[timeline.both]\n"{{blocks}}.{site}" = "{letters}"\n'


FITTED = """
[timeline.cond]
denoiser = "CCCCLCCLC"
[timeline.uncond]
denoiser = "CCLCLCLLC"
[weights]
levels = [{levels}]
[weights.cond.denoiser]
4 = {{ c3 = 1.5, c2 = -0.6, u3 = 0.1, x4 = 0.02, x3 = -0.01 }}
7 = {{ c6 = 1.2, c5 = -0.2 }}
[weights.uncond.denoiser]
2 = {{ c2 = 1.0, u1 = 0.9, c1 = -0.9 }}
4 = {{ u3 = 1.4, u1 = -0.4, x0 = 0.01 }}
6 = {{ c6 = 0.8, c5 = 0.1, u5 = 0.2, x6 = -0.02 }}
7 = {{ u5 = 1.0 }}
"""
FITTED_SPAN = """
[timeline.both]
"{blocks}.1-2" = "CCLCCLCLC"
[weights]
levels = [{levels}]
[weights.cond."{blocks}.1-2"]
2 = {{ c1 = 1.4, c0 = -0.4 }}
5 = {{ c4 = 1.2, c3 = -0.2 }}
7 = {{ c6 = 0.7, c4 = 0.3 }}
[weights.uncond."{blocks}.1-2"]
2 = {{ u1 = 1.5, u0 = -0.5 }}
5 = {{ u4 = 1.2, u3 = -0.2 }}
7 = {{ u6 = 0.7, u4 = 0.3 }}
"""

SHARE = {"needs_guidance": True, "branches_apart": True}
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("full", '[attention.both]\n"*" = ["F"]\n', "full", exact=True, stores=False),
        Row("compute", '[timeline.both]\n"*" = "CCCCCCCCC"\n', "compute", exact=True, stores=False),
        Row("window", _attention("FwwF"), "window", stores=False, needs_grid=True),
        Row("arrow", _attention("a"), "arrow", stores=False, needs_grid=True),
        Row("window, by tokens", _attention("x"), "window", stores=False, needs_grid=True),
        Row("brick", _attention("FbbF"), "brick", stores=False, needs_grid=True),
        Row("coreset", _attention("kFFk"), "coreset", stores=False, needs_grid=True),
        Row("coreset of queries", _attention("q"), "coreset", stores=False, needs_grid=True),
        Row("coresets of all kinds", _attention("pqFk"), "coreset", stores=False, needs_grid=True),
        Row("tail", _attention("FttF"), "tail", needs_grid=True),
        Row("residual", _attention("e"), "residual", needs_grid=True),
        Row("reuse heads", _attention("FrFr"), "reuse"),
        Row("reuse every attention", '[attention.both]\n"*" = ["r"]\n', "reuse"),
        Row("reuse module", _timeline("1.{attn}", "CrCrrCrrC"), "reuse"),
        Row("reuse span, current gates", _timeline("1-2", "CrrCrrCrC"), "reuse"),
        Row("reuse span, stored gates", _timeline("1-2", "CRRCRRCRC"), "reuse"),
        Row("reuse span, gates of both kinds", _timeline("1-2", "CrRCRrCrC"), "reuse"),
        Row("reuse all blocks", '[timeline.both]\n"*" = "CCRCRCRRC"\n', "reuse"),
        Row(
            "reuse on uncond only", '[timeline.uncond]\n"{blocks}.0-1" = "CrrCrrCrC"\n', "reuse",
            needs_guidance=True, branches_apart=True,
        ),
        Row("share heads", _attention("FFss"), "share_branch", **SHARE),
        Row("share heads, copy", _attention("FFcc"), "share_branch", **SHARE),
        Row("share module", _timeline("1.{attn}", "CssCssCsC"), "share_branch", **SHARE),
        Row("share module, copy", _timeline("1.{attn}", "CccCccCcC"), "share_branch", **SHARE),
        Row("share span", _timeline("1-2", "CssCssCsC"), "share_branch", **SHARE),
        Row("share span, copy", _timeline("1-2", "CccCccCcC"), "share_branch", **SHARE),
        Row("reuse feed-forward", _timeline("1.{ff}", "CrCrrCrrC"), "reuse"),
        Row("forecast span", _timeline("1-2", "CCPCPPCPC"), "forecast"),
        Row("forecast span, current gates", _timeline("1-2", "CCCCQQCQC"), "forecast"),
        Row("forecast module", _timeline("1.{attn}", "CPPCPPCPC"), "forecast"),
        Row("skip span", _timeline("1", "CzCzzCCzC"), "skip", stores=False),
        Row("skip module", _timeline("1.{attn}", "CzCzzCCzC"), "skip", stores=False),
        Row("share span, difference continued", _timeline("1-2", "CCdCddCdC"), "share_branch", **SHARE),
        Row(
            "sublayers inside a span", _timeline("1-2", "CCPCPCPCC") + '"{blocks}.1.{ff}" = "CPCCCrCCr"\n',
            "forecast",
        ),
        Row("forecast denoiser", '[timeline.both]\ndenoiser = "CCPCPPCPC"\n', "forecast"),
        Row("share denoiser", '[timeline.both]\ndenoiser = "CCdCddCdC"\n', "share_branch", **SHARE),
        Row("fitted denoiser", FITTED, "fitted", **SHARE),
        Row("fitted span", FITTED_SPAN, "fitted", **SHARE),
        Row(
            "mixed with far parts", '[noise]\nedges = [1.0, 0.5, 0.0]\n'
            '[attention.both]\n"{blocks}.*.{attn}" = ["tFer", "etbk"]\n'
            '[timeline.both]\n"{blocks}.2" = "CCCRCsCRC"\n', "tail", needs_grid=True, **SHARE,
        ),
        Row(
            "mixed", '[noise]\nedges = [1.0, 0.5, 0.0]\n'
            '[attention.both]\n"{blocks}.*.{attn}" = ["FFrs", "Fwrs"]\n'
            '[timeline.both]\n"{blocks}.2" = "CCCRCsCRC"\n', "reuse", needs_grid=True, **SHARE,
        ),
    )
}  # fmt: skip

PIPELINES = ("wan", "wan22", "cogvideox", "pixart_sigma", "qwen_image")
# the same families in other clothes: held to what does not need many runs
VARIANTS = ("wan_ti2v", "wan_i2v", "cogvideox_2b", "cogvideox_15", "pixart_alpha", "qwen_image_edit")

PAIRS = [(row, case) for row in ROWS if not ROWS[row].exact for case in PIPELINES]
STORING = [(row, case) for row, case in PAIRS if ROWS[row].stores]
# sequential, batched and joint guidance once each, for promises in which families differ no further
FEW = [(row, case) for row, case in STORING if case in ("wan", "cogvideox", "qwen_image")]
WIDE = [
    *((row, case) for row in ROWS for case in PIPELINES),
    *(
        (row, case)
        for row in ("window", "reuse span, current gates", "share heads", "share span", "mixed")
        for case in VARIANTS
    ),
]


def names(case: str) -> dict[str, str]:
    """What a family calls its blocks and its self-attention."""
    blocks = "blocks" if TINY[case].family == "wan" else "transformer_blocks"
    family = TINY[case].family
    feed_forward = {"wan": "ffn", "qwen_image": "img_mlp"}.get(family, "ff")
    return {"blocks": blocks, "attn": "attn" if family == "qwen_image" else "attn1", "ff": feed_forward}


ONLY_THE_ROW = "[exact]\nmodulation = false\ntext_kv = false\n"


def recipe(row: str, case: str, extra: str = "") -> Recipe:
    """The row's recipe for a pipeline; `extra` tables are added. Exact tables have tests of their own."""
    extra += "" if "[exact]" in extra else ONLY_THE_ROW
    text = HEAD + extra.replace("{", "{{").replace("}", "}}") + ROWS[row].tables
    fitted = {"levels": levels(case)} if "{levels}" in text else {}
    text = text.format(**names(case), **fitted)
    return Recipe.from_text(text, name=row)


def build(case: str, layers: int = LAYERS) -> Any:
    return TINY[case].build(layers=layers)


def run(pipe: Any, case: str, **call: Any) -> Tensor:
    """Latents of one run in a given situation."""
    situation = call.pop("situation", None)
    if situation is not None:
        call = {**SITUATIONS[situation].call(case), **call}
        SITUATIONS[situation].prepare(pipe, case)
    return TINY[case].call(pipe, **{"steps": STEPS, **call})


def hushed() -> Any:
    """Without the alarm that a recipe changed nothing, where that is right."""
    return pytest.mark.filterwarnings("ignore:dit_accel. recipe .* changed nothing")


@functools.cache
def levels(case: str) -> str:
    """The noise levels of a run of STEPS steps, as a recipe writes them."""
    pipe = build(case, layers=1)
    with dit_accel.accelerated(pipe, Recipe.neutral()) as handle:
        run(pipe, case)
        return ", ".join(map(repr, handle.session.tracker.levels))


@functools.cache
def plain(case: str, situation: str | None = None, steps: int = STEPS) -> Tensor:
    """Latents of the pipeline as diffusers made it."""
    more = {} if steps == STEPS else {"steps": steps}
    return run(build(case), case, situation=situation, **more)


@functools.cache
def fresh(row: str, case: str, situation: str | None = None) -> tuple[Tensor, Report]:
    """Latents and report of the first run of a newly built and accelerated pipeline."""
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    return run(pipe, case, situation=situation), handle.report()


# ---- situations: what may change from one call to the next


@dataclass(frozen=True)
class Situation:
    """Call arguments, and what is done to the pipeline before."""

    call: Callable[[str], dict[str, Any]] = lambda case: {}
    prepare: Callable[[Any, str], None] = lambda pipe, case: None
    fits: Callable[[str], bool] = lambda case: True


def _other_scheduler(pipe: Any, case: str) -> None:
    make = {
        "wan": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "wan22": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        "cogvideox": lambda: diffusers.CogVideoXDDIMScheduler(),
        "pixart_sigma": lambda: diffusers.EulerDiscreteScheduler(),
        "qwen_image": lambda: diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.1
        ),
    }
    pipe.scheduler = make[case]()


def _other_size(case: str) -> dict[str, Any]:
    video = TINY[case].size[2] > 1
    return {"height": 96, "width": 64, **({"num_frames": 5} if video else {})}


SITUATIONS: dict[str, Situation] = {
    "same call": Situation(),
    "other prompt and seed": Situation(lambda _: {"prompt_seed": 1, "seed": 1}),
    "other size": Situation(_other_size),
    "other step count": Situation(lambda _: {"steps": 11}),
    "batch of two": Situation(lambda _: {"batch": 2}),
    "two per prompt": Situation(
        lambda _: {"images_per_prompt": 2}, fits=lambda case: TINY[case].count_argument is not None
    ),
    "no guidance": Situation(lambda _: {"guidance": 1.0}),
    "other scheduler": Situation(prepare=_other_scheduler),  # last: it stays on the pipeline
}


# ---- interference


@contextmanager
def during_step(pipe: Any, number: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` when the scheduler steps for the `number`-th time (from 0); works with every pipeline."""
    original, count = pipe.scheduler.step, 0

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if count == number:
            act()
        count += 1
        return original(*args, **kwargs)

    pipe.scheduler.step = functools.wraps(original)(step)
    try:
        yield
    finally:
        del pipe.scheduler.step


def memory_of(handle: dit_accel.Handle) -> Any:
    """The stored values of an accelerated pipeline."""
    return handle._session.memory


def poison(handle: dit_accel.Handle, branch: str | None = None) -> int:
    """Fill stored values with NaN, those of one branch or all; the number of tensors filled."""
    filled = 0
    for ((_, _, owner, _), _), slot in memory_of(handle).slots.items():
        for tensor in slot.tensors:
            if branch in (None, owner):
                tensor.fill_(float("nan"))
            elif owner == "both":  # a batched pair in one buffer: [uncond, cond]
                tensor.chunk(2)[0 if branch == "uncond" else 1].fill_(float("nan"))
            else:
                continue
            filled += 1
    return filled


def denoisers(pipe: Any) -> list[torch.nn.Module]:
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return [module for module in found if module is not None]
