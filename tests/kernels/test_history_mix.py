"""history_mix: every backend against its equation, the exact limits, and what is refused in which words."""

import sys

import pytest
import torch

from dit_accel.testing import assert_as_accurate_as, far_from_zero
from dit_accel_kernels import dispatch
from dit_accel_kernels.history_mix import history_mix, plain, quantize_rows_fp8
from tests.kernels.mix_cases import CASES, Case, by_definition, by_torch, guarded, make, run

BACKENDS = (*dispatch.backends("history_mix"), "auto")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def needs(call, backend):
    if backend == "auto":
        return
    reason = dispatch.why_not(
        "history_mix", backend, out=call.out, ys=call.ys, x=call.x, gate=call.gate, scales=call.scales
    )
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_as_accurate_as_plain_torch(backend, dtype, case):
    """`out` is NaN before, numbers are around 1."""
    call = make(CASES[case], dtype)
    needs(call, backend)
    out = run(call, backend)
    assert out is call.out
    assert_as_accurate_as(out, by_torch(call), by_definition(call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", ["eight", "gated_reuse", "no_gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_rounds_once(backend, dtype, case):
    """Half a unit of the largest number, and a breath for the float32 sum."""
    call = make(CASES[case], dtype)
    needs(call, backend)
    exact = by_definition(call)
    error = (run(call, backend).double() - exact).abs() / exact.abs().clamp(min=1)
    assert error.max() <= 0.5001 * torch.finfo(dtype).eps


@pytest.mark.parametrize("case", ["odd", "reuse", "gated_reuse", "strided", "wider_than_a_piece"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_be_x(backend, dtype, case):
    call = make(CASES[case], dtype)
    needs(call, backend)
    expected = run(call, backend).clone()
    assert run(call, backend, out=call.x) is call.x
    assert torch.equal(call.x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_y_of_weight_one_is_copied_bit_by_bit(backend, dtype):
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -6e-8, 1.5, 65504]
    y = torch.tensor(values * 3, dtype=dtype).view(3, 9)
    out = history_mix([y], [1.0], backend=backend)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert out.data_ptr() != y.data_ptr() and torch.equal(out.view(bits), y.view(bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_y_of_weight_zero_is_not_read(backend):
    call = make(Case((2, 17, 64), ("", "", ""), gate=(2, 1, 64)), torch.float32)
    needs(call, backend)
    weights = (1.5, 0.0, -0.5)
    expected = run(call, backend, weights=weights).clone()
    call.ys[1].fill_(float("nan"))
    assert torch.equal(run(call, backend, weights=weights), expected)
    zero = run(call, backend, weights=(0.0, 0, -0.0))
    assert torch.equal(zero, call.x)
    assert torch.equal(run(call, backend, weights=(0.0, 0, 0), x=None), torch.zeros_like(zero))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_with_a_weight_are_not_hidden(backend):
    call = make(CASES["float8"], torch.float32)
    needs(call, backend)
    call.x[0, 3, 5] = float("nan")
    call.gate[1, 0, 2] = float("inf")
    call.ys[0].view(torch.uint8)[0, 4, 6] = 0x7F  # the NaN of float8
    out = run(call, backend)
    assert out[0, 3, 5].isnan() and out[0, 4, 6].isnan() and not out[1, :, 2].isfinite().any()
    assert out.isfinite().sum() == out.numel() - 2 - 17


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_float8_is_read(backend):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    call = make(Case((256,), ("",), x=False), torch.float32)
    call.ys, call.scales = [every], [torch.full((1,), 2.0)]
    needs(call, backend)
    torch.testing.assert_close(run(call, backend), 4 * 0.875 * every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dtype_of_the_result(backend):
    half, single = (torch.ones(2, 8, dtype=dtype) for dtype in (torch.float16, torch.float32))
    values, scales = quantize_rows_fp8(half)
    if backend == "triton":
        needs(make(Case((2, 8), ("float8_e4m3fn",)), torch.float32), backend)
    float8 = {"ys": [values, values], "weights": [1, 1], "scales": [scales, scales], "backend": backend}
    assert history_mix([half], [2.0], single, backend=backend).dtype == torch.float32
    assert history_mix([values, half], [1, 1], scales=[scales, None], backend=backend).dtype == torch.float16
    assert history_mix(**float8, dtype=torch.float32).dtype == torch.float32
    assert torch.equal(history_mix(**float8, out=torch.empty(2, 8)), 2 * single)
    with pytest.raises(
        ValueError, match="all ys are float8_e4m3fn and there is no x: name a dtype or give out"
    ):
        history_mix(**float8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_are_no_work(backend):
    call = make(Case((2, 0, 7), gate=(2, 1, 7)), torch.float32)
    assert run(call, backend).shape == (2, 0, 7)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages by mprotect")
@pytest.mark.parametrize("case", ["odd", "float8", "wide"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_read_or_written_beyond_a_tensor(backend, case):
    call = make(CASES[case], torch.float32)
    needs(call, backend)
    expected = run(call, backend).clone()
    call.ys = [guarded(y) for y in call.ys]
    call.scales = [None if scale is None else guarded(scale) for scale in call.scales]
    call.x, call.gate, call.out = (guarded(t) for t in (call.x, call.gate, call.out))
    assert torch.equal(run(call, backend), expected)


y, wrong = torch.ones(2, 4, 8), torch.ones(2, 4, 9)
values, scales = quantize_rows_fp8(y)
ring = torch.ones(3, 2, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ys": [], "weights": []}, "it mixes 1 to 8 ys; got 0"),
        ({"ys": [y] * 9, "weights": [1] * 9}, "it mixes 1 to 8 ys; got 9"),
        ({"weights": [1, 2]}, "each of 1 ys needs a weight.* got 2 weights and 1 scales"),
        ({"weights": [float("nan")]}, r"weights must be finite; got \[nan\]"),
        ({"ys": [torch.ones(())]}, "got a number without axes"),
        (
            {"ys": [y, wrong], "weights": [1, 1]},
            r"ys\[1\] must have the shape of ys\[0\], \[2, 4, 8\]; got \[2, 4, 9\]",
        ),
        ({"x": wrong}, "x must have the shape of"),
        ({"out": wrong}, "out must have the shape of"),
        (
            {"gate": torch.ones(2, 1, 1)},
            r"gate must end in 8 and broadcast to ys \[2, 4, 8\]; got \[2, 1, 1\]",
        ),
        ({"gate": torch.ones(3, 1, 8)}, r"gate must end in 8 .* got \[3, 1, 8\]"),
        ({"x": y.int()}, "x must be float32, bfloat16, float16, float64; got int32"),
        ({"x": y.to("meta")}, r"on one device; ys\[0\] is on cpu, x on meta"),
        ({"ys": [values]}, r"ys\[0\] is float8_e4m3fn and needs scales\[0\], float32 \[2, 4, 1\]; got None"),
        ({"ys": [values], "scales": [scales[0]]}, r"got float32 \[4, 1\]. quantize_rows_fp8 makes both"),
        ({"scales": [scales]}, r"scales\[0\] must be None, for ys\[0\] is float32"),
        ({"dtype": torch.int8}, "dtype must be float32, .*; got int8"),
        ({"dtype": torch.float16, "out": y.clone()}, "dtype float16 was asked for and out is float32"),
        ({"out": y}, "out lies in the memory of a tensor .* only x itself may be out"),
        ({"x": ring[0], "out": ring.view(-1)[1:65].view(2, 4, 8)}, "out lies in the memory"),
        ({"gate": ring[0, 0, 0], "out": ring[0]}, "out lies in the memory"),
        ({"out": torch.ones(8).expand(2, 4, 8)}, "out is broadcast"),
        ({"x": y.clone().requires_grad_()}, "no backward: call it under torch.no_grad"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_says_why_and_writes_nothing(arguments, said):
    given = {"ys": [y], "weights": [1.5]} | arguments
    before = [t.clone() for t in (y, ring)]
    with pytest.raises(ValueError, match=said):
        history_mix(**given)
    assert all(torch.equal(*pair) for pair in zip((y, ring), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_one_ring_may_be_read_and_written(backend):
    entries = far_from_zero(3, 2, 17, 8)
    expected = 1.5 * entries[0] - 0.5 * entries[1]
    if backend == "triton":
        needs(make(CASES["odd"], torch.float32), backend)
    history_mix([entries[0], entries[1]], [1.5, -0.5], out=entries[2], backend=backend)
    torch.testing.assert_close(entries[2], expected)


@pytest.mark.parametrize("case", ["no_x", "alone", "reuse", "gated_reuse", "no_gate", "odd", "eight"])
def test_auto_takes_pytorch_where_that_is_faster_and_means_the_same(case, monkeypatch):
    taken = []
    inner = plain.mix
    monkeypatch.setattr(plain, "mix", lambda *given: taken.append(inner(*given)))
    single = make(CASES[case], torch.float32)
    assert_as_accurate_as(run(single, "auto"), by_torch(single), by_definition(single))
    assert len(taken) == 1
    half = make(CASES[case], torch.bfloat16)
    run(half, "auto")
    one = len(half.ys) == 1  # a chain would round more than once
    assert len(taken) == 1 + one
    monkeypatch.setattr(plain, "FEW", 0)
    run(single, "auto")
    assert len(taken) == 1 + 2 * one
    monkeypatch.setenv("DIT_ACCEL_BACKEND", "reference")  # named by hand: that runs
    run(single, "auto")
    assert len(taken) == 1 + 2 * one


@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@torch.no_grad()
def test_compiled_code_sees_one_node_in_one_graph_and_computes_the_same(backend, in_place):
    call = make(CASES["odd"], torch.float32)
    needs(call, backend)

    def function(x, gate, *ys):
        x = x * 2
        return history_mix(ys, call.weights, x, gate, out=x if in_place else None, backend=backend) + 1

    tensors = call.x, call.gate, *call.ys
    expected, graphs = function(*tensors), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for compiler in (keep, "aot_eager"):
        torch.compiler.reset()
        found = torch.compile(function, fullgraph=True, backend=compiler)(*tensors)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    nodes = [n for graph in graphs for n in graph.graph.nodes if "history_mix" in str(n.target)]
    assert len(graphs) == len(nodes) == 1


@torch.no_grad()
def test_compiled_code_refuses_what_can_be_seen_only_when_it_runs():
    function = torch.compile(lambda y: history_mix([y], [2.0], out=y), backend="eager")
    with pytest.raises(ValueError, match="out lies in the memory"):
        function(torch.ones(2, 4, 8))
