"""How block_attention's Triton kernel is compiled ahead of time: every committed config and its variants."""

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from dit_accel_kernels.ahead import Build
from dit_accel_kernels.block_attention import HEAD_WIDTHS
from dit_accel_kernels.block_attention.triton import box, constants
from dit_accel_kernels.block_attention.triton_configs import Config, config_for
from dit_accel_kernels.block_attention.triton_kernel import attend_blocks

ARCHITECTURES = (80, 89, 90, 100)
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
HOT = (64, 128)  # head widths of nearly all video and image models
INT32 = (
    "VALID_KEYS",
    "Q_STARTS",
    "K_STARTS",
    "PATTERN",
    "KIND",
    "SLOT",
    "POINTERS",
    "SPLIT",
    "INDICES",
    "WORK",
)
FLOAT32 = ("LSE", "CACHED_LSE", "KEY_BIAS")
ALWAYS_ONE = ("lse_h", "tail_s", "bias_n")  # strides of dense tensors: a launch makes them constants


def builds() -> Iterator[Build]:
    """Every build of the budget."""
    for arch in ARCHITECTURES:
        for width in HEAD_WIDTHS:
            yield build(arch, width)
        for width in HOT:
            yield build(arch, width, dtype="fp16")
            yield build(arch, width, block=64)
            yield build(arch, width, masks=True)  # key_bias and valid_keys: by pointers everywhere
        yield build(arch, 64, dtype="fp32")


def build(
    arch: int,
    width: int,
    dtype: str = "bf16",
    block: int = 128,
    masks: bool = False,
    config: Config | None = None,  # the committed one when None
) -> Build:
    """One way: with `cached` and `cached_lse`, for all kinds; `masks` adds key_bias and valid_keys."""
    bits = 32 if dtype == "fp32" else 16
    config = config or config_for((arch // 10, arch % 10), width, bits, block)
    described = config.descriptors and not masks
    fixed: dict[str, Any] = constants(width, block, config, described, DTYPES[dtype])
    loads = f"tensordesc<{dtype}{box(fixed)}>" if described else f"*{dtype}"
    types = dict.fromkeys(attend_blocks.arg_names, "i32") | {"scale": "fp32", "K": loads, "V": loads}
    types |= dict.fromkeys(("Q", "OUT", "CACHED"), f"*{dtype}")
    types |= dict.fromkeys(INT32, "*i32") | dict.fromkeys(FLOAT32, "*fp32")
    fixed |= dict.fromkeys(ALWAYS_ONE, 1)
    if not masks:
        fixed |= {"KEY_BIAS": None, "VALID_KEYS": None}
    # with one stage nothing is loaded ahead
    copies = "UTMALDG" if described else "LDGSTS" if config.num_stages > 1 else MATRIX[arch]
    needs = () if dtype == "fp32" else (MATRIX[arch], copies)
    way = "descriptors" if described else "pointers"
    name = f"sm_{arch} D={width} {dtype} block={block} {way}{' masks' if masks else ''}"
    hot = width in HOT and bits == 16 and block == 128 and not masks
    return Build(
        name, attend_blocks, arch, types, fixed, config.num_warps, config.num_stages, hot=hot, needs=needs
    )
