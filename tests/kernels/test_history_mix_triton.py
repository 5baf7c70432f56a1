"""history_mix in Triton without a device: the interpreter against the equation, and what is refused.

The interpreter proves index arithmetic; it rounds to bfloat16 wrongly, which is refused. Its flag is read
when a kernel is imported: hence the own process.
"""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from dit_accel_kernels.dispatch import why_not
from tests.kernels.mix_cases import CASES, make
from tests.kernels.test_block_attention_triton import interpret, interpreted

FILE = "tests/kernels/test_history_mix.py"
ACCURATE = f"{FILE}::test_every_backend_is_as_accurate_as_plain_torch"
OTHERS = (
    *(
        f"test_out_may_be_x[triton-{dtype}-{case}]"
        for dtype in ("float32", "float16")
        for case in ("odd", "strided")
    ),
    *(f"test_it_rounds_once[triton-{case}-float16]" for case in ("eight", "gated_reuse", "no_gate")),
    *(
        f"test_nothing_is_read_or_written_beyond_a_tensor[triton-{case}]"
        for case in ("odd", "float8", "wide")
    ),
    "test_a_y_of_weight_zero_is_not_read[triton]",
    "test_nan_and_infinity_with_a_weight_are_not_hidden[triton]",
    "test_every_float8_is_read[triton]",
    "test_the_dtype_of_the_result[triton]",
)


@interpreted
def test_every_case_is_as_accurate_as_plain_torch_in_the_interpreter():
    ids = [f"{ACCURATE}[triton-{dtype}-{case}]" for dtype in ("float32", "float16") for case in CASES]
    ids += [f"{FILE}::{name}" for name in OTHERS]
    printed = interpret("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *ids)
    assert f"{len(ids)} passed" in printed and "skipped" not in printed, printed


def refused(**changes):
    call = make(CASES["odd"], torch.float32)
    given = {"out": call.out, "ys": call.ys, "x": call.x, "gate": call.gate, "scales": call.scales}
    return why_not("history_mix", "triton", **(given | changes)) or ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "needs a CUDA device, or TRITON_INTERPRET=1 before"),
        ({"x": torch.ones(2, 17, 7).double()}, "takes float32, float16, bfloat16; got float32, float64"),
        ({"x": torch.ones(2, 7, 17).mT}, "last axis of a tensor is not contiguous"),
    ],
    ids=["device", "float64", "layout"],
)
def test_a_reason_is_given_for_what_it_cannot_take(changes, said):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("asks what is said without the interpreter")
    assert said in refused(**changes)


@interpreted
def test_a_bfloat16_result_is_refused_in_the_interpreter():
    code = (
        "import torch; from tests.kernels.test_history_mix_triton import refused\n"
        "half = torch.ones(2, 17, 7).bfloat16()\nprint(refused(out=half))\nprint(refused(x=half))"
    )
    said = interpret("-c", code).splitlines()
    assert said == ["Triton's interpreter rounds to bfloat16 by cutting off", ""]
