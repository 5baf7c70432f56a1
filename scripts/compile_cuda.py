"""Compile every configuration of the CUDA kernels for sm_90a, no GPU needed, and hold them to their budget.

python scripts/compile_cuda.py [folder for the cubins]

Set DIT_ACCEL_NVDISASM to a disassembler (Triton's wheel has one) to count instructions too.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from dit_accel_kernels.cuda_build import compile_cubin, opcodes, over_budget, usage

FOLDER = Path(__file__).parent.parent / "kernels" / "dit_accel_kernels" / "block_attention"

if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    disassembler = os.environ.get("DIT_ACCEL_NVDISASM") or shutil.which("nvdisasm")
    broken = 0
    for name, budget in json.loads((FOLDER / "cuda_budget.json").read_text()).items():
        cubin = target / f"block_attention_{name}.cubin"
        found = usage(compile_cubin(FOLDER / "cuda.cu", cubin, tuple(budget["defines"])))
        counts = opcodes(cubin, disassembler) if disassembler else None
        said = over_budget(found, counts, budget)
        broken += bool(said)
        shown = (
            {n: counts[n] for n in (*budget["present"], *budget["absent"])} if counts else "no disassembler"
        )
        print(f"{name}: {found} {shown} {'; '.join(said) or 'ok'}", flush=True)
    sys.exit(broken > 0)
