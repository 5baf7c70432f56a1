"""Which tile sizes the Triton backend uses: read from `triton_configs.json`, by device, head width and dtype.

The file is written by hand from what `scripts/compile_kernels.py` finds free of spills and, on a device, from
the tuning slice of `scripts/gpu_suite.py`; `tuned` says which devices have had that.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("triton_configs.json")


@dataclass(frozen=True)
class Config:
    """How a program is laid out."""

    block_n: int  # keys in flight
    num_warps: int
    num_stages: int
    descriptors: bool  # keys and values through the tensor memory accelerator, where they can


def architecture(capability: tuple[int, int]) -> int:
    """The listed architecture whose tiles fit a device: by generation and by shared memory."""
    if capability == (8, 0):
        return 80
    if capability[0] in (9, 10):
        return capability[0] * 10
    return 89  # sm_86, sm_89, sm_120: 99 KiB of shared memory


@functools.cache
def config_for(capability: tuple[int, int], width: int, bits: int, block: int) -> Config:
    """The committed choice for a device, a head width, 16 or 32 bits, and blocks of up to 64 or 128."""
    padded = 1 << (width - 1).bit_length()
    rows = 64 if block <= 64 else 128
    return table()[architecture(capability), padded, bits, rows]


@functools.cache
def table() -> dict[tuple[int, int, int, int], Config]:
    """(architecture, padded width, bits, block) -> config."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))["configs"]
    return {
        (row["arch"], row["width"], row["bits"], row["block"]): Config(
            row["block_n"], row["num_warps"], row["num_stages"], row["descriptors"]
        )
        for row in rows
    }
