"""The C backend of history_mix: levels of processors, threads, and what it declines."""

import pytest
import torch

from dit_accel_kernels import build, dispatch
from dit_accel_kernels.history_mix import cpu, plain
from tests.kernels import test_history_mix as every_backend
from tests.kernels.mix_cases import CASES, Case, make, run


@pytest.mark.parametrize("case", ["odd", "eight", "mixed", "float8", "wider_than_a_piece"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_narrower_builds_are_as_accurate(level, dtype, case, monkeypatch):
    if level not in build.levels():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", level)
    every_backend.test_every_backend_is_as_accurate_as_plain_torch("cpu", dtype, case)


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_narrower_builds_read_every_float8(level, monkeypatch):
    if level not in build.levels():
        pytest.skip(f"this processor has no {level}")
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", level)
    every_backend.test_every_float8_is_read("cpu")


@pytest.mark.parametrize("own", [False, True], ids=["torch's threads", "own threads"])
@pytest.mark.parametrize("case", ["long", "strided", "no_gate"])
def test_the_number_of_threads_changes_nothing(case, own, monkeypatch):
    monkeypatch.setattr(cpu, "OF_A_THREAD", 1)
    if own:
        monkeypatch.setenv("DIT_ACCEL_OWN_THREADS", "1")
    call = make(CASES[case], torch.float32)
    every_backend.needs(call, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(call, "cpu").clone())
            call.out.fill_(float("nan"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda call: {"x": call.x.double()},
            "takes float32, float16, bfloat16, float8_e4m3fn; got .*float64",
        ),
        (lambda call: {"ys": [call.ys[0], call.ys[1].mT.contiguous().mT]}, "last axis .* is not contiguous"),
    ],
    ids=["float64", "layout"],
)
def test_what_it_declines_has_a_reason(change, said):
    call = make(Case((2, 17, 8)), torch.float32)
    with pytest.raises(dispatch.BackendUnavailable, match=said):
        run(call, "cpu", **change(call))


def test_axes_that_do_not_merge_are_declined_and_the_reference_takes_them(monkeypatch):
    monkeypatch.setattr(plain, "FEW", 0)
    call = make(Case((2, 3, 2, 3, 4)), torch.float32)
    x = call.x.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4)
    expected = run(call, "reference").clone()
    with pytest.raises(dispatch.BackendUnavailable, match="do not merge into 3 of rows"):
        run(call, "cpu", x=x)
    dispatch._say_once.cache_clear()
    with pytest.warns(
        UserWarning, match='history_mix runs on its slower backend "reference" here. cpu: its axes'
    ):
        assert torch.equal(run(call, "auto", x=x), expected)


def test_auto_takes_it_and_without_a_compiler_goes_on(monkeypatch):
    monkeypatch.setattr(plain, "FEW", 0)
    call, called, inner = make(CASES["odd"], torch.float32), [], cpu.history_mix
    every_backend.needs(call, "cpu")
    monkeypatch.setattr(cpu, "history_mix", lambda *given: called.append(inner(*given)))
    expected = run(call, "auto").clone()
    assert len(called) == 1
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", "nonesuch")
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match='DIT_ACCEL_CPU_LEVEL is "nonesuch"'):
        torch.testing.assert_close(run(call, "auto"), expected)
    assert len(called) == 1
