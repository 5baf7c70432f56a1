"""The Hopper kernel's constants, run through a numpy model of TMA and wgmma: tiles must be products of
integers."""

import re
from pathlib import Path

import numpy as np
import pytest

from dit_accel_kernels.block_attention import hopper_model as model

FOLDER = Path(model.__file__).parent
BLOCK = 128


def constants(width: int) -> dict[str, int]:
    """The integer constexprs of the kernel's sources for one head width, evaluated as C++ would."""
    values: dict[str, int] = {"HEAD_DIM": width, "KV_STAGES": 2}
    text = (FOLDER / "hopper.cuh").read_text() + (FOLDER / "cuda.cu").read_text()
    for name, expression in re.findall(r"^constexpr int (\w+) = ([^;]+);", text, re.MULTILINE):
        choice = re.fullmatch(r"(.+) \? (.+) : (.+)", expression)
        if choice:
            expression = f"{choice[2]} if {choice[1]} else {choice[3]}"
        values[name] = eval(expression.replace("/", "//"), {}, values)
    return values


def integers(*shape, seed):
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float16)


def load(memory, start, tile_bytes, box):
    for c in range(box.shape[1] // 64):
        model.tma_tile(memory, start + c * tile_bytes, box[:, c * 64 : c * 64 + 64])


def test_constants_are_those_of_the_model():
    c = constants(128)
    for name in ("SWIZZLE_ROW_BYTES", "SWIZZLE_ATOM_BYTES", "DESCRIPTOR_SWIZZLE_128B", "K_STEP"):
        assert c[name] == getattr(model, name)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("consumer", [0, 1])
def test_scores_of_a_tile_are_the_product_of_its_queries_and_keys(width, consumer):
    """Consumer.start_scores, step by step."""
    c = constants(width)
    q, k = integers(BLOCK, width, seed=0), integers(BLOCK, width, seed=1)
    memory = np.zeros(2 * c["OPERAND_BYTES"], np.uint8)
    load(memory, 0, c["TILE_BYTES"], q)
    load(memory, c["OPERAND_BYTES"], c["TILE_BYTES"], k)
    layout = c["SCORES_LEADING_BYTES"], c["SCORES_STRIDE_BYTES"]
    first = model.Descriptor(consumer * c["CONSUMER_QUERY_BYTES"], *layout).encode()
    second = model.Descriptor(c["OPERAND_BYTES"], *layout).encode()
    scores = np.zeros((64, BLOCK))
    for step in range(width // c["K_STEP"]):
        at = step // 4 * c["TILE_BYTES"] + step % 4 * c["K_STEP_BYTES"]
        scores += model.wgmma_shared(memory, first + at // 16, second + at // 16, BLOCK)
    expected = q[consumer * 64 : consumer * 64 + 64].astype(float) @ k.astype(float).T
    assert np.array_equal(scores, expected)


@pytest.mark.parametrize("width", [64, 128])
def test_weights_in_registers_times_values_are_the_plain_product(width):
    """Consumer.pack_weights and start_values: the accumulator of the scores becomes operand A as it lies."""
    c = constants(width)
    weights, v = integers(64, BLOCK, seed=2), integers(BLOCK, width, seed=3)
    memory = np.zeros(c["OPERAND_BYTES"], np.uint8)
    load(memory, 0, c["TILE_BYTES"], v)
    row, column = model.accumulator_place(np.arange(128)[:, None], np.arange(64))
    registers = weights[row, column]  # [128 threads, 64 numbers], two to a register
    first = model.Descriptor(0, c["VALUES_LEADING_BYTES"], c["VALUES_STRIDE_BYTES"]).encode()
    out = np.zeros((64, width))
    for step in range(BLOCK // c["K_STEP"]):
        a = registers[:, 8 * step : 8 * step + 8]  # weights + 4 * step
        b = first + step * c["VALUES_STEP_BYTES"] // 16
        out += model.wgmma_registers(memory, a, b, width)
    assert np.array_equal(out, weights.astype(float) @ v.astype(float))


@pytest.mark.parametrize(
    "name", ["SCORES_STRIDE_BYTES", "K_STEP_BYTES", "TILE_BYTES", "CONSUMER_QUERY_BYTES"]
)
def test_the_model_sees_a_wrong_constant_of_the_scores(name, monkeypatch):
    right = constants(128)
    monkeypatch.setitem(globals(), "constants", lambda width: right | {name: right[name] // 2 or 8})
    with pytest.raises((AssertionError, ValueError)):
        test_scores_of_a_tile_are_the_product_of_its_queries_and_keys(128, 1)


@pytest.mark.parametrize("name", ["VALUES_LEADING_BYTES", "VALUES_STRIDE_BYTES", "VALUES_STEP_BYTES"])
def test_the_model_sees_a_wrong_constant_of_the_values(name, monkeypatch):
    right = constants(128)
    monkeypatch.setitem(globals(), "constants", lambda width: right | {name: right[name] // 2})
    with pytest.raises(AssertionError):
        test_weights_in_registers_times_values_are_the_plain_product(128)


def test_every_element_of_a_fragment_has_one_owner():
    for place, numbers, columns in ((model.accumulator_place, 64, 128), (model.operand_place, 8, 16)):
        row, column = place(np.arange(128)[:, None], np.arange(numbers))
        assert len(set(zip(row.ravel().tolist(), column.ravel().tolist(), strict=True))) == 64 * columns


def test_a_whole_row_of_a_tile_stays_in_its_128_bytes():
    """hide_values zeroes the row of one key without undoing the swizzle."""
    inside = np.arange(16 * model.SWIZZLE_ATOM_BYTES)
    assert np.array_equal(model.swizzle(inside) // 128, inside // 128)
    assert sorted(model.swizzle(inside)) == inside.tolist()


def test_descriptor_bits_are_those_of_the_kernel():
    """`matrix_descriptor` of hopper.cuh, written out."""
    assert model.Descriptor(0x12340, 16384, 1024).encode() == 0x1234 | 1024 << 16 | 64 << 32 | 1 << 62
    assert model.Descriptor.decode(model.Descriptor(0x12340, 16384, 1024).encode()).leading == 16384
