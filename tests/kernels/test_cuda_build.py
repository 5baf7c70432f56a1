"""What is read from ptxas and the disassembler, and the budget of every CUDA configuration where nvcc is."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

import dit_accel_kernels
from dit_accel_kernels.cuda_build import (
    Usage,
    compile_cubin,
    find_nvcc,
    opcodes,
    over_budget,
    source_key,
    usage,
)

FOLDER = Path(dit_accel_kernels.__file__).parent / "block_attention"
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
@pytest.mark.parametrize("name", BUDGETS)
def test_every_configuration_compiles_within_its_budget(name, tmp_path):
    budget, cubin = BUDGETS[name], tmp_path / "f.cubin"
    found = usage(compile_cubin(FOLDER / "cuda.cu", cubin, tuple(budget["defines"])))
    disassembler = os.environ.get("DIT_ACCEL_NVDISASM") or shutil.which("nvdisasm")
    assert over_budget(found, opcodes(cubin, disassembler) if disassembler else None, budget) == []
