"""Break-even densities: how they are looked up, who wins, and that dense runs where it is faster."""

import json
from typing import Any

import pytest
import torch

from dit_accel_kernels import build
from dit_accel_kernels.block_attention import Kind, block_attention, break_even, cpu, plan_blocks, starts_of
from dit_accel_kernels.block_attention.bench import plan_of
from tests.kernels.test_block_attention_cpu import needs_library


def row(tokens, density, width=64, dtype="float32", backend="cpu", processor=None):
    row = {"backend": backend, "processor": processor or break_even.processor(), "dtype": dtype}
    return row | {"width": width, "tokens": tokens, "density": density, "over_sdpa": {}}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Put rows into the shipped table, and nothing of this user's."""
    monkeypatch.setattr(break_even, "own_file", lambda: tmp_path / "own.json")
    monkeypatch.setattr(break_even, "SHIPPED", tmp_path / "break_even.json")

    def put(*rows, file=None):
        break_even.store(rows, file or break_even.SHIPPED)

    put()
    yield put
    break_even._rows.cache_clear()
    break_even.density.cache_clear()


def density(tokens, width=64, dtype="float32", backend="cpu"):
    return break_even.density(backend, break_even.processor(), dtype, width, tokens)


def test_between_sizes_the_smaller_neighbour_counts(measured):
    measured(row(512, 0.25), row(1024, 0.5), row(2048, 0.75), row(1024, 0.375, width=128))
    assert [density(n) for n in (512, 700, 1024, 1500, 2048, 9000)] == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert density(1024, width=96) == 0.375 and density(1024, width=32) == 0.5


def test_of_what_was_not_measured_nothing_is_known(measured):
    measured(row(512, 0.25), row(512, 0.5, processor="vax"))
    assert density(511) is None and density(512, backend="gathered") is None


def test_a_dtype_that_was_not_measured_takes_the_least(measured):
    measured(row(512, 0.25), row(512, 0.125, dtype="bfloat16"))
    assert density(512, dtype="float16") == 0.125


def test_a_user_s_own_measurement_wins_and_a_new_one_replaces_it(measured):
    measured(row(512, 0.25), row(512, 0.25, dtype="bfloat16"))
    measured(row(512, 0.5), file=break_even.own_file())
    measured(row(512, 0.75), file=break_even.own_file())
    assert density(512) == 0.75 and density(512, dtype="bfloat16") == 0.25


def test_a_broken_file_is_no_error(measured):
    break_even.SHIPPED.write_text("not json")
    break_even._rows.cache_clear()
    assert density(512) is None


@torch.no_grad()
def test_auto_runs_dense_where_every_block_is_attended_and_dense_is_faster(measured, monkeypatch):
    needs_library()
    called = []
    inner = cpu.block_attention
    monkeypatch.setattr(cpu, "block_attention", lambda *given: called.append(inner(*given)))
    q, k, v = (torch.randn(2, 512, 2, 64) for _ in range(3))
    plan = plan_of(512, 2, (1,))
    measured(row(512, 1.0))
    expected, expected_lse = block_attention(q, k, v, plan)
    assert len(called) == 1
    measured(row(512, 0.5))
    for backend, more in (("auto", 0), ("cpu", 1)):  # a backend that is named runs
        before = len(called)
        out, lse = block_attention(q, k, v, plan, backend=backend)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
        assert len(called) == before + more
    for sparse in (plan_of(512, 2, (0.75,)), plan_of(512, 2, (1, Kind.SKIP))):  # what a plan says stays so
        before = len(called)
        block_attention(q, k, v, sparse, out=torch.zeros_like(q))
        block_attention(q, k, v, plan, key_bias=torch.zeros(1, 1, 512))
        assert len(called) == before + 2


def test_a_plan_slower_than_dense_is_told(measured, monkeypatch):
    needs_library()
    q = torch.zeros(1, 512, 2, 64)
    measured(row(512, 0.5))
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.75,))) == (
        'density 0.75 is slower than dense here: backend "cpu" breaks even at 0.50'
    )
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.5,))) is None
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.75,)), backend="cpu") is None
    starts = starts_of(512)
    emits = plan_blocks(torch.ones(2, 4, 4), starts, starts, [Kind.EMIT_TAIL] * 2)
    assert break_even.slower_than_dense(q, q, q, emits) is None
    monkeypatch.setenv("DIT_ACCEL_BACKEND", "cpu")  # named by hand: that runs
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.75,))) is None


def test_a_gpu_has_rows_of_its_own(measured, monkeypatch):
    """Nothing of it runs here, so the tensors are told to be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(break_even, "choose", lambda op, **given: "triton")
    measured(row(512, 0.5, dtype="bfloat16", backend="triton", processor="sm_90"))

    class OnGPU:
        shape, dtype, device = (1, 512, 2, 64), torch.bfloat16, torch.device("cuda", 0)

    q: Any = OnGPU()
    assert "breaks even at 0.50" in (break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.75,))) or "")
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.5,))) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))  # not measured
    assert break_even.slower_than_dense(q, q, q, plan_of(512, 2, (0.75,))) is None


def test_a_plan_over_some_of_the_tokens_is_measured_against_all(measured):
    """Half of 1024 rows and keys are a quarter of the work, at the break-even of 1024 tokens."""
    needs_library()
    q, plan = torch.zeros(1, 1024, 2, 64), plan_of(512, 2, (1,))
    measured(row(512, 0.0), row(1024, 0.25))
    assert break_even.slower_than_dense(q, q, q, plan, instead_of=(1024, 1024)) is None
    measured(row(512, 1.0), row(1024, 0.2))
    said = 'density 0.25 is slower than dense here: backend "cpu" breaks even at 0.20'
    assert break_even.slower_than_dense(q, q, q, plan, instead_of=(1024, 1024)) == said


def test_the_shipped_table_can_be_read():
    rows = json.loads(break_even.SHIPPED.read_text())["rows"]
    assert rows and all(set(each) == set(row(1, 1)) for each in rows)
    assert all(0 <= each["density"] <= 1 for each in rows)
    assert all(each["processor"] in build.LEVELS or each["processor"].startswith("sm_") for each in rows)
