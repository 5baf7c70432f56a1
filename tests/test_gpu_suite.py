"""The GPU suite, rehearsed: it runs, notices a broken promise, and keeps nothing it did not measure."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_suite.py"


@pytest.fixture(scope="module")
def suite_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rehearsal(module: ModuleType):
    return module.Suite(torch.device("cpu"), limit=600, rehearse=True)


@pytest.mark.parametrize("name", ["wan22", "pixart_sigma"])
def test_the_contract_holds_and_reuse_happens(suite_module: ModuleType, name: str):
    said = suite_module.check_contract(suite_module.TINY[name], torch.device("cpu"))
    assert said.startswith("bit-equal, undone") and "'reuse'" in said


def test_a_broken_promise_is_a_failure_and_the_next_case_still_runs(suite_module: ModuleType, monkeypatch):
    ran: list[str] = []

    def cases(suite):
        yield "broken", lambda: suite_module.require(False, "neutral is not bit-equal")
        yield "good", lambda: ran.append("good")

    monkeypatch.setitem(suite_module.SLICES, "contract", cases)
    suite = rehearsal(suite_module)
    suite.run(["contract"])
    assert suite.failures == ["contract: broken: AssertionError: neutral is not bit-equal"]
    assert ran == ["good"]


def test_a_slice_stops_when_its_time_is_over(suite_module: ModuleType, monkeypatch, capsys):
    monkeypatch.setitem(suite_module.SLICES, "contract", lambda suite: iter([("late", lambda: "ran")]))
    suite = suite_module.Suite(torch.device("cpu"), limit=-1.0, rehearse=True)
    suite.run(["contract"])
    assert "time is over, left out late" in capsys.readouterr().out


def test_a_real_size_is_measured_dense_neutral_and_reused(suite_module: ModuleType):
    suite = rehearsal(suite_module)
    suite_module.measure_model(suite, suite_module.REAL_SIZES[0])
    assert [line["name"] for line in suite.lines][:2] == ["dense", "dit_accel:neutral"]
    assert all(line["what"] == "model" and "random weights" in line["model"] for line in suite.lines)
    assert suite.lines[2]["counters"]["reuse"] > 0


@pytest.mark.parametrize("real", range(5))
def test_a_real_size_fits_its_class(suite_module: ModuleType, real: int):
    """The configurations are accepted, without allocating anything."""
    size = suite_module.REAL_SIZES[real]
    denoiser = type(suite_module.TINY[size.case].build(layers=1).transformer)
    with torch.device("meta"):
        model = denoiser(**size.config)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx([1.4, 0.6, 5.6, 20.4, 14.3][real], rel=0.05)


def test_the_attention_slices_run_and_record_what_they_measure(suite_module: ModuleType):
    suite = rehearsal(suite_module)
    attention = suite_module.gpu_attention
    cases = {"all_kinds_strided": attention.CASES["all_kinds_strided"], "bias": attention.CASES["bias"]}
    for name in cases:
        assert attention.check_case(suite, name, torch.float16) == "within the budget"
    assert attention.check_long(suite, 64, False) == "within the budget"
    assert attention.tune_width(suite, 32).startswith("arch 0, width 32: Config(")
    said = attention.bench_density(suite, "mixed", attention.MIXED)
    assert "TFLOP/s on attended blocks" in said and "of ideal" in said
    assert all(line["what"] == "op" and line["seconds"] > 0 for line in suite.lines)


def test_the_mix_slice_runs_and_a_wrong_result_fails_it(suite_module: ModuleType, monkeypatch):
    mix, suite = suite_module.gpu_mix, rehearsal(suite_module)
    cases = dict(mix.slice_(suite))
    assert cases["strided float16"]() == cases["float8 bfloat16"]() == "within the budget"
    assert "of the bandwidth of a copy" in cases["speed of gated forecast of 2 in float8"]()
    (line,) = suite.lines
    assert line["model"] == "history_mix" and line["seconds"] > 0 and line["rivals"]["copy"] > 0
    monkeypatch.setattr(mix, "run", lambda call, backend: call.out.fill_(1.0))
    with pytest.raises(AssertionError, match="over the budget"):
        cases["strided float16"]()


def test_break_even_densities_are_measured_and_a_rehearsal_writes_none(suite_module, tmp_path: Path):
    suite = rehearsal(suite_module)
    suite.break_even = tmp_path / "break_even.json"
    cases = dict(suite_module.gpu_attention.break_even(suite))
    assert "speed over SDPA by density {'1.0': " in cases["triton D=64 256 tokens"]()
    assert not suite.break_even.exists()


def test_a_wrong_result_fails_the_attention_slice(suite_module: ModuleType, monkeypatch):
    attention, suite = suite_module.gpu_attention, rehearsal(suite_module)
    right = attention.on_device

    def wrong(suite, call):
        results = right(suite, call)
        return results | {"lse": results["lse"] + 0.1}

    monkeypatch.setattr(attention, "on_device", wrong)
    with pytest.raises(AssertionError, match="over the budget"):
        attention.check_case(suite, "odd", torch.float16)


def test_the_benchmark_lists_have_the_density_they_are_named_for(suite_module: ModuleType):
    attention = suite_module.gpu_attention
    near = attention.lists(32768, [1.0, 0.25, 0.1])
    assert near.sum(2).unique(dim=1).tolist() == [[256], [64], [26]]
    assert near.diagonal(dim1=1, dim2=2).all()
    tiles = attention.tile_windows((6, 6, 6), 3)
    assert tiles.shape == (216, 216) and (tiles.sum(1) == 27).all()


def test_a_rehearsal_keeps_no_numbers(suite_module: ModuleType, tmp_path: Path):
    with pytest.raises(SystemExit):
        suite_module.main(["--rehearse", "--out", str(tmp_path / "lines.jsonl")])


def test_the_cuda_slices_run(suite_module: ModuleType, capsys):
    suite, cuda = rehearsal(suite_module), suite_module.gpu_cuda
    cases = dict(cuda.correct(suite))
    assert cases["integers D=128 torch.bfloat16"]() == "exact"
    assert cases["ragged_inside D=64 torch.float16"]() == "within the budget"
    assert cases["long D=64"]() == "within the budget"
    checks = len(cases) - 1
    assert cases["record"]() == f"{checks} checks; a rehearsal verifies nothing" and checks > 50
    assert dict(cuda.tune(suite))["D=64"]().startswith("width 64: ")
    assert [build.stages for build in cuda.candidates(64)] == [1, 2, 3, 4, 5]
    assert [build.stages for build in cuda.candidates(128)] == [1, 2]
    assert "of ideal" in dict(cuda.bench(suite))["mixed"]()
    assert [line["name"] for line in suite.lines if "dit_accel" in line["name"]] == ["dit_accel:cuda"]


def test_only_a_slice_without_failures_is_recorded(suite_module: ModuleType, monkeypatch, tmp_path: Path):
    cuda, file = suite_module.gpu_cuda, tmp_path / "verified.json"
    suite = suite_module.Suite(torch.device("cpu"), limit=1.0, verified=file)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    suite.failures.append("cuda: odd: wrong")
    with pytest.raises(AssertionError, match="nothing is recorded"):
        cuda.keep_record(suite, 3)
    assert not file.exists()
    suite.failures[:] = ["toys: another slice"]
    assert cuda.keep_record(suite, 3) == f"3 checks, recorded in {file}"
    assert cuda.verified.why_unverified(cuda.NAME, "sm_90", cuda.numerics_hash(), file) is None


def test_one_wrong_row_is_no_exact_tile(suite_module: ModuleType, monkeypatch):
    cuda = suite_module.gpu_cuda

    def swapped(*tensors, **options):
        out, lse = right(*tensors, **options)
        return out.roll(1, dims=1), lse

    right = cuda.block_attention
    monkeypatch.setattr(cuda, "block_attention", swapped)
    with pytest.raises(AssertionError, match="128 are not their key's values"):
        cuda.check_integers(rehearsal(suite_module), 64, torch.float16)
