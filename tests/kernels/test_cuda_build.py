"""What is read from ptxas and the disassembler, and the budget of every CUDA configuration where nvcc is."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dit_accel_kernels.block_attention import cuda_builds
from dit_accel_kernels.block_attention.cuda_builds import FOLDER, SOURCE, CudaBuild, build_for, builds
from dit_accel_kernels.cuda_build import (
    Usage,
    compile_cubin,
    find_disassembler,
    find_nvcc,
    opcodes,
    over_budget,
    source_key,
    usage,
)

ROOT = Path(__file__).parent.parent.parent
BUDGETS = json.loads((FOLDER / "cuda_budget.json").read_text())
LOG = """ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
    112 bytes stack frame, 152 bytes spill stores, 224 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 112 bytes cumulative stack size
"""


def test_the_log_of_ptxas_is_read():
    assert usage(LOG) == Usage(168, 112, 376, ("C7510",))


def test_what_breaks_a_budget_is_said():
    budget = BUDGETS["bf16_64"]
    good = Counter(HGMMA=1, UTMALDG=1, USETMAXREG=1)
    assert over_budget(Usage(168, 0, 0, ()), good, budget) == []
    said = over_budget(usage(LOG), Counter(HGMMA=1, UTMALDG=1, STL=3), budget)
    assert said == [
        "C7510 warned of",
        "stack 112, at most 0",
        "spills 376, at most 0",
        "no USETMAXREG",
        "3 STL",
    ]


def test_a_build_is_kept_under_its_source_flags_and_compiler(tmp_path):
    source = tmp_path / "a.cu"
    source.write_text("a")
    key = source_key([source], ("-O3",), "13.0")
    assert key != source_key([source], ("-O2",), "13.0") and key != source_key([source], ("-O3",), "13.1")
    source.write_text("b")
    assert key != source_key([source], ("-O3",), "13.0")


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize(
    "build", [build_for(128, "bf16"), build_for(64, "fp16")], ids=lambda build: build.name
)
def test_a_configuration_compiles_within_its_budget(build, tmp_path):
    """The others: `make kernels-check`."""
    cubin = tmp_path / "f.cubin"
    found = usage(compile_cubin(SOURCE, cubin, build.defines))
    disassembler = find_disassembler()
    counts = opcodes(cubin, disassembler) if disassembler else None
    assert over_budget(found, counts, BUDGETS[build.name]) == []


def test_every_build_has_a_budget_and_a_name_of_its_own():
    assert list(BUDGETS) == [build.name for build in builds()]
    assert CudaBuild(64, "bf16", 2).name == "bf16_64_stages2"
    names = {build.file_name for build in (*builds(), CudaBuild(64, "bf16", 2))}
    assert len(names) == 5 and all(name.endswith(".cubin") for name in names)


def test_a_released_cubin_is_taken_and_one_of_other_sources_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_ACCEL_CUBINS", str(tmp_path))
    monkeypatch.setattr(cuda_builds, "cached_cubin", lambda *built: built)
    build = build_for(64, "bf16")
    released = tmp_path / build.file_name
    released.write_bytes(b"cubin")
    assert cuda_builds.find_cubin(build) == released
    changed = tmp_path / "changed.cu"
    changed.write_text("other")
    monkeypatch.setattr(cuda_builds, "SOURCE", changed)
    assert cuda_builds.find_cubin(build) == (changed, cuda_builds.HEADERS, build.defines)


def test_without_nvcc_the_script_says_so_and_passes(tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {"PATH": "", "CUDA_HOME": str(tmp_path), "PYTHONPATH": paths}
    script = [sys.executable, str(ROOT / "scripts" / "compile_cuda.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "not compiled: no nvcc" in done.stdout, done.stderr
