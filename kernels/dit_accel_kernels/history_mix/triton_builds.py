"""How history_mix's Triton kernel is compiled ahead of time: what reuse and forecasts launch."""

from collections.abc import Iterator

from dit_accel_kernels.ahead import Build
from dit_accel_kernels.history_mix.triton import WARPS, tile_of
from dit_accel_kernels.history_mix.triton_kernel import mix_rows

ARCHITECTURES = (80, 89, 90, 100)
# name -> type of x, gate and out; types of ys; gated
CASES = {
    "bf16 reuse": ("bf16", ("bf16",), False),
    "bf16 forecast of 2, gated": ("bf16", ("bf16",) * 2, True),
    "fp16 forecast of 3, gated": ("fp16", ("fp16",) * 3, True),
    "fp32 forecast of 2, gated": ("fp32", ("fp32",) * 2, True),
    "bf16 forecast of 2 in fp8, gated": ("bf16", ("u8",) * 2, True),
    "bf16 mix of 8, gated": ("bf16", ("bf16",) * 8, True),
}
WIDTH = 1536  # any width of 512 and more has these tiles


def builds() -> Iterator[Build]:
    """Every build of the budget."""
    for arch in ARCHITECTURES:
        for case in CASES:
            yield build(arch, case)


def build(arch: int, case: str) -> Build:
    """A case for contiguous rows [B, N, D] and a gate [B, 1, D]; they only move memory, so none may spill."""
    dtype, stored, gated = CASES[case]
    count, steps = len(stored), ("i32",) * 3
    scaled = stored[0] == "u8"
    types = {
        "OUT": f"*{dtype}", "X": f"*{dtype}", "GATE": f"*{dtype}" if gated else "constexpr",
        "YS": tuple(f"*{each}" for each in stored),
        "SCALES": ("*fp32" if scaled else "constexpr",) * count,
        "WEIGHTS": ("fp32",) * count,
        **dict.fromkeys(("out_steps", "x_steps", "gate_steps"), steps),
        **dict.fromkeys(("y_steps", "scale_steps"), (steps,) * count),
        **dict.fromkeys(("rows", "middle", "inner", "width"), "i32"),
    }  # fmt: skip
    constants = {"COUNT": count, **tile_of(WIDTH)} | ({} if gated else {"GATE": None})
    name, needs = f"history_mix sm_{arch} {case}", ("LDG.E.128",)
    return Build(name, mix_rows, arch, types, constants, WARPS, 3, hot=True, needs=needs)
