"""block_attention in Triton without a device: the interpreter against the equations, and what is refused.

The interpreter proves index arithmetic and the meaning of every kind. It shows no race, no layout fault and
no speed, and it cannot calculate in bfloat16. Its flag is read when a kernel is imported: hence the own
process.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from dit_accel_kernels.block_attention import Kind, plan_blocks, starts_of
from dit_accel_kernels.dispatch import why_not

ROOT = Path(__file__).parent.parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
import triton  # noqa: E402  (after the skip)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
NUMPY = tuple(int(part) for part in numpy.__version__.split(".")[:2])
interpreted = pytest.mark.skipif(
    TRITON < (3, 9) and NUMPY >= (2, 4), reason="the interpreter of this Triton needs numpy < 2.4"
)
# A 128 x 128 pair of blocks takes 40 to 90 ms in the interpreter: these cover every kind, option and width.
CASES = {
    "float32": [
        *("one_token", "cross_short_keys", "cross_long_keys", "empty_lists"),
        *("small_blocks", "ragged_inside", "bias", "all_kinds_strided"),
    ],
    "float16": ["one_token", "ragged_inside", "all_kinds_lengths"],
}
DESCRIBED = """
import functools, torch
from dit_accel_kernels.block_attention import triton as backend
from dit_accel_kernels.block_attention.triton_configs import Config
from tests.kernels import block_cases, test_block_attention
used = []
described = backend._described
backend._described = lambda t, sizes: used.append(sizes) or described(t, sizes)
config = functools.partial(backend.block_attention, config=Config(64, 4, 2, True))
backend.block_attention = config
for case in ("one_token", "cross_short_keys", "all_kinds_strided"):
    test_block_attention.test_every_backend_is_as_accurate_as_plain_torch("triton", torch.float16, case)
assert len(used) == 6, used
"""

# values around 100 and a residual of about 1: a near part rounded to float16 would be wrong by 0.03
RESIDUAL = """
import torch
from dit_accel_kernels.block_attention import Kind, block_attention, plan_blocks, starts_of
q, k, v = torch.randn(3, 1, 32, 1, 32, generator=torch.Generator().manual_seed(0)).half()
v += 100
plan = plan_blocks(torch.eye(2)[None], starts_of(32, 16), starts_of(32, 16), [Kind.EMIT_RESIDUAL], block=16)
ours = torch.full((1, 32, 1, 32), float("nan")).half()
exact = ours.double()
block_attention(q, k, v, plan, cached=ours, backend="triton")
block_attention(q.double(), k.double(), v.double(), plan, cached=exact, backend="reference")
error = (ours - exact).abs().max().item()
assert error <= torch.finfo(torch.float16).eps * exact.abs().max().item(), error
"""


def interpret(*command: str) -> str:
    """What a command printed, in a process whose kernels are interpreted."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@interpreted
@pytest.mark.parametrize("dtype", CASES)
def test_every_kind_is_as_accurate_as_plain_torch_in_the_interpreter(dtype: str):
    test = "tests/kernels/test_block_attention.py::test_every_backend_is_as_accurate_as_plain_torch"
    ids = [f"{test}[triton-{dtype}-{case}]" for case in CASES[dtype]]
    printed = interpret("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *ids)
    assert f"{len(ids)} passed" in printed and "skipped" not in printed, printed


@interpreted
def test_keys_and_values_through_descriptors_are_as_accurate():
    interpret("-c", DESCRIBED)


@interpreted
def test_an_emitted_residual_is_rounded_once():
    interpret("-c", RESIDUAL)


def call(width: int = 64, dtype: torch.dtype = torch.float16, block: int = 128) -> dict:
    starts, q = starts_of(10, block), torch.zeros(1, 10, 1, width, dtype=dtype)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [Kind.ATTEND], block=block)
    return {"q": q, "k": q, "v": q, "plan": plan}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (call(), "needs a CUDA device, or TRITON_INTERPRET=1 before"),
        (call(width=80), "head width 80 is none of 32, 64, 72, 96, 128"),
        (call(dtype=torch.float64), "q, k and v of one dtype, float32, float16, bfloat16; got float64"),
        (call() | {"k": torch.zeros(1, 10, 1, 64)}, "got float16, float32, float16"),
        (call(block=256), "blocks of 256 tokens are over 128"),
        (call() | {"q": torch.zeros(1, 10, 1, 128).half()[..., ::2]}, "not contiguous"),
    ],
    ids=["device", "width", "float64", "mixed", "block", "strides"],
)
def test_a_reason_is_given_for_what_it_cannot_take(arguments: dict, said: str):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("asks what is said without the interpreter")
    reason = why_not("block_attention", "triton", **arguments)
    assert said in (reason or "")


@interpreted
def test_bfloat16_is_refused_in_the_interpreter():
    code = (
        "from tests.kernels.test_block_attention_triton import call; import torch\n"
        "from dit_accel_kernels.dispatch import why_not\n"
        "print(why_not('block_attention', 'triton', **call(dtype=torch.bfloat16)))\n"
        "print(why_not('block_attention', 'triton', **call(dtype=torch.float16)))"
    )
    assert interpret("-c", code).splitlines() == [
        "Triton's interpreter calculates bfloat16 wrongly without a word",
        "None",
    ]
