"""Which cubins block_attention has for Hopper, what each is built from, and where one is found.

A cubin is looked for in DIT_ACCEL_CUBINS, else in `cubins` beside this file, where `scripts/compile_cuda.py`
puts them; a name there carries a hash of the sources, so that one of older sources is never loaded. Else nvcc
builds it into the user's cache (`cuda_build.py`).
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dit_accel_kernels.cuda_build import FLAGS, BuildError, cached_cubin, source_key

FOLDER = Path(__file__).parent
SOURCE, HEADERS = FOLDER / "cuda.cu", [FOLDER / "arguments.h", FOLDER / "hopper.cuh"]
HOST = FOLDER / "cuda_launch.py"  # what a launch is given decides the numbers as much as the kernel does
KERNEL = "block_attention_forward"
WIDTHS = (64, 128)
DTYPES = ("bf16", "fp16")
STAGES = {64: 4, 128: 2}  # chosen by what fits; `scripts/gpu_suite.py cuda-tune` tells what is fastest
CONSUMERS, BLOCK = 2, 128
MOST_SHARED = 227 << 10  # bytes of one block on compute capability 9.0


@dataclass(frozen=True)
class CudaBuild:
    """One cubin: a head width, a dtype, and how many tiles of K and of V are in flight."""

    width: int
    dtype: str
    stages: int

    @property
    def name(self) -> str:
        """`bf16_128`, the line of the budget; other stages than the committed ones are named."""
        own = "" if self.stages == STAGES[self.width] else f"_stages{self.stages}"
        return f"{self.dtype}_{self.width}{own}"

    @property
    def shared_bytes(self) -> int:
        """Of struct Shared in cuda.cu, which refuses to compile where this is wrong."""
        operand = BLOCK * self.width * 2
        near, bias = CONSUMERS * self.width // 2 * 128 * 4, CONSUMERS * 2 * BLOCK * 4
        keys, item, barriers = 8 * self.stages, 8 * 4, 8 * (4 * self.stages + 2)
        return operand * (1 + 2 * self.stages) + near + bias + keys + item + barriers

    @property
    def defines(self) -> tuple[str, ...]:
        """What the compiler is told."""
        sizes = {"HEAD_DIM": self.width, "KV_STAGES": self.stages, "SHARED_BYTES": self.shared_bytes}
        return (*(f"-D{name}={n}" for name, n in sizes.items()), *(["-DFP16"] * (self.dtype == "fp16")))

    @property
    def file_name(self) -> str:
        """Of the cubin that a release carries."""
        return f"{self.name}-{source_key([SOURCE, *HEADERS], FLAGS + self.defines, '')[:20]}.cubin"


def build_for(width: int, dtype: str) -> CudaBuild:
    """The committed build for a head width of WIDTHS and a dtype of DTYPES."""
    return CudaBuild(width, dtype, STAGES[width])


def builds() -> Iterator[CudaBuild]:
    """Every build of the budget."""
    for dtype in DTYPES:
        for width in WIDTHS:
            yield build_for(width, dtype)


def folder_of_cubins() -> Path:
    """Where released cubins lie."""
    return Path(os.environ.get("DIT_ACCEL_CUBINS") or FOLDER / "cubins")


def find_cubin(build: CudaBuild) -> Path:
    """The released cubin, or nvcc's from the cache, built at first use. Raises BuildError for neither."""
    released = folder_of_cubins() / build.file_name
    if released.is_file():
        return released
    try:
        return cached_cubin(SOURCE, HEADERS, build.defines)
    except BuildError as error:
        raise BuildError(f"there is no {released.name} in {released.parent}, and {error}") from error


def numerics_hash() -> str:
    """Of all that decides what comes out: sources, flags and sizes of builds, and how a launch is packed."""
    parts = [path.read_bytes() for path in (SOURCE, *HEADERS, HOST)]
    parts += [" ".join(FLAGS).encode(), *(" ".join(build.defines).encode() for build in builds())]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
