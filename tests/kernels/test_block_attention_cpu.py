"""The C backend of block_attention: levels of processors, threads, layouts, and what it declines."""

import pytest
import torch

from dit_accel_kernels import build
from dit_accel_kernels.block_attention import Kind, block_attention, cpu, plan_blocks, starts_of
from tests.kernels import test_block_attention as every_backend
from tests.kernels.block_cases import ALL_KINDS, CASES, Case, make
from tests.kernels.test_block_attention import run

SOME = ("odd", "cross_short_keys", "ragged_inside", "bias", "all_kinds_lengths", "all_kinds_strided")


def needs_library():
    q = torch.zeros(1, 1, 1, 8)
    plan = plan_blocks(torch.ones(1, 1, 1), starts_of(1), starts_of(1), [Kind.ATTEND])
    reason = cpu.why_not(q, q, q, plan)
    if reason:
        pytest.skip(reason)


def same(one: dict, other: dict) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_narrower_builds_are_as_accurate(level, dtype, case, monkeypatch):
    if level not in build.levels():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", level)
    every_backend.test_every_backend_is_as_accurate_as_plain_torch("cpu", dtype, case)


@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_number_of_threads_changes_nothing(dtype, own, monkeypatch):
    monkeypatch.setattr(cpu, "OF_A_THREAD", 1)
    if own:
        monkeypatch.setenv("DIT_ACCEL_OWN_THREADS", "1")
    call = make(CASES["all_kinds"], dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(call, "cpu"))
    finally:
        torch.set_num_threads(before)
    same(results[0], results[1])
    same(results[0], results[2])


@torch.no_grad()
def test_buffers_of_other_types_and_layouts_are_read_and_written():
    call = make(Case((140, 140), 64, ALL_KINDS), torch.float32)
    expected = run(call, "cpu")
    for name in ("out", "cached"):
        tensor = call.options[name]
        call.options[name] = tensor.double().transpose(1, 3).contiguous().transpose(1, 3)
    call.options["cached_lse"] = call.options["cached_lse"].double()
    found = run(call, "cpu")
    same({n: t.float() for n, t in expected.items()}, {n: t.float() for n, t in found.items()})


@torch.no_grad()
def test_keys_with_no_weight_may_hold_anything():
    call = make(Case((140, 140), 32, (Kind.ATTEND,), density=1.0, bias=True), torch.float32)
    call.options["key_bias"][:, :, 3::7] = float("-inf")
    clean = run(call, "cpu")
    call.k[:, 3::7] = call.v[:, 3::7] = float("nan")
    same(clean, run(call, "cpu"))


@torch.no_grad()
def test_a_broadcast_batch_with_lengths_hides_keys_per_sample():
    call = make(Case((140, 140), 32, (Kind.ATTEND,), batch=2, kv_batch=1, density=1.0), torch.float32)
    whole = run(call, "cpu")["out"]
    call.options["valid_keys"] = torch.tensor([140, 60], dtype=torch.int32)
    cut = run(call, "cpu")["out"]
    assert torch.equal(cut[0], whole[0]) and not torch.allclose(cut[1], whole[1])


@torch.no_grad()
def test_nan_in_a_seen_key_is_not_hidden():
    call = make(Case((140, 140), 32, (Kind.ATTEND,), density=1.0), torch.float32)
    call.k[:, 5, :, 3] = float("nan")
    result = run(call, "cpu")
    assert result["out"].isnan().all() and result["lse"].isnan().all()


@pytest.mark.parametrize("width", [8, 40, 72, 96, 128, 256])
@torch.no_grad()
def test_head_widths(width):
    call = make(Case((70, 200), width, (Kind.ATTEND, Kind.ATTEND), density=1.0), torch.float32)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (call.q, call.k, call.v))
    )
    torch.testing.assert_close(run(call, "cpu")["out"], dense.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.double(), "q is float64 and q float64: only float32, float16 or bfloat16, one for all"),
        (lambda q: q[..., :12], "head width 12 is not a multiple of 8"),
        (lambda q: q[..., ::2], "the last dimension of q is not contiguous"),
    ],
    ids=["float64", "width", "layout"],
)
def test_what_it_declines_has_a_reason(change, said):
    q = change(torch.zeros(1, 10, 1, 32))
    plan = plan_blocks(torch.ones(1, 1, 1), starts_of(10), starts_of(10), [Kind.ATTEND])
    assert cpu.why_not(q, q, q, plan) == said


@torch.no_grad()
def test_auto_takes_it_and_without_a_compiler_goes_on(monkeypatch):
    needs_library()
    called = []
    monkeypatch.setattr(cpu, "block_attention", lambda *given: called.append(given))
    q = torch.zeros(1, 10, 1, 32)
    plan = plan_blocks(torch.ones(1, 1, 1), starts_of(10), starts_of(10), [Kind.ATTEND])
    block_attention(q, q, q, plan)
    assert len(called) == 1
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", "nonesuch")
    out, _ = block_attention(q, q, q, plan)
    assert len(called) == 1 and torch.equal(out, q)


def test_a_build_that_failed_is_not_tried_again(monkeypatch):
    tried = []

    def fail(source, level):
        tried.append(level)
        raise build.BuildError("no")

    cpu._load_once.cache_clear()
    monkeypatch.setattr(build, "library", fail)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="no"):
            cpu.load("portable")
    cpu._load_once.cache_clear()
    assert tried == ["portable"]
