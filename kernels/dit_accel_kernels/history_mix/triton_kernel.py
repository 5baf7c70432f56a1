"""The Triton kernel of history_mix: tiles of rows and columns, each operand read once, `out` written once."""

import triton
import triton.language as tl


@triton.jit
def from_float8(byte):
    """float8_e4m3fn, read as uint8, as float32: sm_80 has no such type. The exponent is off by 120."""
    rest = (byte & 0x7F).to(tl.int32)
    number = (rest << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    number = tl.where(rest == 0x7F, float("nan"), number)
    return tl.where(byte >= 0x80, -number, number)


@triton.jit
def load_floats(OPERAND, offsets, inside):
    """What lies there as float32."""
    value = tl.load(OPERAND + offsets, mask=inside, other=0)
    if OPERAND.dtype.element_ty == tl.uint8:
        return from_float8(value)
    return value.to(tl.float32)


@triton.jit
def offsets_of(at, steps):
    """Where the rows at places of three axes begin in an operand, int64 [ROWS, 1]."""
    return (at[0] * steps[0] + at[1] * steps[1] + at[2] * steps[2])[:, None]


@triton.jit
def mix_rows(
    OUT, X, GATE, YS, SCALES, WEIGHTS,  # a tuple has an entry for each y
    out_steps, x_steps, gate_steps, y_steps, scale_steps,  # of rows on three axes, in elements
    rows, middle, inner, width,  # rows in all, and on the last two axes; numbers in a row
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile: out = x + gate * sum_j w_j y_j, summed in float32."""
    column_tiles = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    row = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = ((tile % column_tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    present = (row < rows)[:, None]
    inside = present & (column < width)
    at = (row // (middle * inner), row // inner % middle, row % inner)
    # the first is not added to 0: that loses the sign of a zero
    total = WEIGHTS[0] * load_scaled(
        YS[0], SCALES[0], y_steps[0], scale_steps[0], at, column, present, inside
    )
    for n in tl.static_range(1, COUNT):
        y = load_scaled(YS[n], SCALES[n], y_steps[n], scale_steps[n], at, column, present, inside)
        total += WEIGHTS[n] * y
    if GATE is not None:
        total *= load_floats(GATE, offsets_of(at, gate_steps) + column, inside)
    if X is not None:
        total += load_floats(X, offsets_of(at, x_steps) + column, inside)
    tl.store(OUT + (offsets_of(at, out_steps) + column), total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def load_scaled(Y, SCALE, steps, scale_steps, at, column, present, inside):
    """One y, times the scale of its row where it has one."""
    value = load_floats(Y, offsets_of(at, steps) + column, inside)
    if SCALE is not None:
        value *= tl.load(SCALE + offsets_of(at, scale_steps), mask=present, other=0)
    return value
