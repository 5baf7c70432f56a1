"""Compile every configuration of the CUDA kernels for sm_90a, no GPU needed, and hold them to their budget.

python scripts/compile_cuda.py            into a folder that is thrown away
python scripts/compile_cuda.py FOLDER     keep the cubins, under the names that a release looks for: a wheel
                                          carries those in kernels/dit_accel_kernels/block_attention/cubins

Registers, stack and spills are from ptxas; instructions are counted where there is a disassembler (Triton has
one). The exit status is 1 for a build over its budget, and 0 with the reason where there is no nvcc.
"""

import json
import sys
import tempfile
from pathlib import Path

from dit_accel_kernels.block_attention.cuda_builds import FOLDER, SOURCE, CudaBuild, builds
from dit_accel_kernels.cuda_build import (
    compile_cubin,
    find_disassembler,
    find_nvcc,
    opcodes,
    over_budget,
    usage,
)

BUDGETS = json.loads((FOLDER / "cuda_budget.json").read_text(encoding="utf-8"))


def check(build: CudaBuild, folder: Path) -> list[str]:
    """Compile one build into a folder, print what came out, and return what it breaks of its budget."""
    cubin, budget, disassembler = folder / build.file_name, BUDGETS[build.name], find_disassembler()
    found = usage(compile_cubin(SOURCE, cubin, build.defines))
    counts = opcodes(cubin, disassembler) if disassembler else None
    said = over_budget(found, counts, budget)
    named = (*budget["present"], *budget["absent"])
    shown = {name: counts[name] for name in named} if counts else "no disassembler"
    print(f"{build.name}: {found} {shown} {'; '.join(said) or 'ok'}", flush=True)
    return said


def main(folder: Path) -> int:
    """Every build of the budget; the exit status."""
    if find_nvcc() is None:
        print("CUDA kernels are not compiled: no nvcc in CUDA_HOME, /usr/local/cuda or on the PATH")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    broken = [build.name for build in builds() if check(build, folder)]
    print(f"over their budget: {', '.join(broken)}" if broken else "all within their budgets")
    return int(bool(broken))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as scratch:
        raise SystemExit(main(Path(scratch)))
