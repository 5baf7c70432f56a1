"""What Hopper's copy engine and matrix unit do with shared memory, in numpy: the law for the constants of
`cuda.cu`.

Memory is an array of bytes. A TMA box leaves its rows swizzled; a matrix descriptor says where wgmma finds
element
(row, column) of an operand; fragment maps say which thread and register hold an element. Only the 128-byte
swizzle
and 16-bit operands are modelled, the ones that the kernel uses.

Sources: PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions" (matrix descriptor, register
fragments,
shared memory layouts) and "Tensor swizzling modes"; the canonical layouts in CUTLASS,
`mma_traits_sm90_gmma.hpp`.
"""

from dataclasses import dataclass

import numpy as np

SWIZZLE_ROW_BYTES = 128  # eight chunks of 16 bytes
SWIZZLE_ATOM_BYTES = 1024  # eight rows
DESCRIPTOR_SWIZZLE_128B = 1  # bits 62 and 63
K_STEP = 16  # K of wgmma for 16-bit operands
UNIT = 16  # bytes: descriptors count in these
CORE = 8  # rows of a core matrix


def swizzle(address: np.ndarray) -> np.ndarray:
    """Where a byte of a 1024-byte aligned tile lies: address bits 4-6 XOR bits 7-9."""
    return address ^ ((address >> 3) & 0x70)


def tma_tile(memory: np.ndarray, start: int, box: np.ndarray) -> None:
    """Write a box [rows, 64] of 16-bit numbers at `start` of `memory` (uint8), as TMA with SWIZZLE_128B
    does."""
    rows, columns = box.shape
    if columns * 2 != SWIZZLE_ROW_BYTES or start % SWIZZLE_ATOM_BYTES:
        raise ValueError(f"a tile is 64 columns wide and 1024-byte aligned; got {columns} columns at {start}")
    linear = start + np.arange(rows * SWIZZLE_ROW_BYTES)
    memory[swizzle(linear)] = np.ascontiguousarray(box).view(np.uint8).ravel()


@dataclass(frozen=True)
class Descriptor:
    """A shared memory matrix descriptor, its fields in bytes."""

    start: int
    leading: int
    stride: int
    mode: int = DESCRIPTOR_SWIZZLE_128B

    def encode(self) -> int:
        """The 64 bits: start 0-13, leading 16-29, stride 32-45, in units of 16 bytes; swizzle mode 62-63."""
        start, leading, stride = ((x & 0x3FFFF) >> 4 for x in (self.start, self.leading, self.stride))
        return start | leading << 16 | stride << 32 | self.mode << 62

    @classmethod
    def decode(cls, bits: int) -> "Descriptor":
        """The fields as the matrix unit reads them."""
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, bits >> 62)


def k_major_address(descriptor: Descriptor, row: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Bytes of (row, k) of a K-major operand: eight rows of 128 bytes an atom, `stride` to the next eight
    rows.

    With this swizzle the 16 columns of one instruction lie in one row, so `leading` is not used.
    """
    _check(descriptor)
    linear = descriptor.start + row // CORE * descriptor.stride + row % CORE * SWIZZLE_ROW_BYTES + 2 * k
    return swizzle(linear)


def mn_major_address(descriptor: Descriptor, k: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Bytes of (k, column) of an MN-major operand: a row of memory holds 64 columns of one k.

    `leading` is to the next 64 columns, `stride` to the next eight k.
    """
    _check(descriptor)
    group, inside = column // 64, column % 64
    linear = descriptor.start + group * descriptor.leading + 2 * inside
    return swizzle(linear + k // CORE * descriptor.stride + k % CORE * SWIZZLE_ROW_BYTES)


def _check(descriptor: Descriptor) -> None:
    if descriptor.mode != DESCRIPTOR_SWIZZLE_128B:
        raise ValueError(f"only swizzle mode {DESCRIPTOR_SWIZZLE_128B} is modelled; got {descriptor.mode}")


def read16(memory: np.ndarray, address: np.ndarray, dtype: type = np.float16) -> np.ndarray:
    """The 16-bit numbers at byte addresses, float64."""
    return memory.view(dtype)[address // 2].astype(np.float64)


def wgmma_shared(memory: np.ndarray, a: int, b: int, columns: int) -> np.ndarray:
    """m64nNk16 with both operands K-major in shared memory, by their descriptors' bits: [64, columns]."""
    k = np.arange(K_STEP)
    operands = [
        read16(memory, k_major_address(Descriptor.decode(bits), np.arange(rows)[:, None], k))
        for bits, rows in ((a, 64), (b, columns))
    ]
    return operands[0] @ operands[1].T


def wgmma_registers(memory: np.ndarray, a: np.ndarray, b: int, columns: int) -> np.ndarray:
    """m64nNk16 with A [128 threads, 8 numbers] in registers and B MN-major in shared memory: [64,
    columns]."""
    matrix = np.full((64, K_STEP), np.nan)
    row, k = operand_place(np.arange(128)[:, None], np.arange(8))
    matrix[row, k] = a
    values = mn_major_address(Descriptor.decode(b), np.arange(K_STEP)[:, None], np.arange(columns))
    return matrix @ read16(memory, values)


def accumulator_place(thread: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of a thread's numbers 0, 1, 2, ... in a 64 x N accumulator of a warpgroup."""
    lane = thread % 32
    row = thread // 32 * 16 + lane // 4 + 8 * (number // 2 % 2)
    return row, number // 4 * 8 + lane % 4 * 2 + number % 2


def operand_place(thread: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, k) of a thread's 8 numbers, two in each of 4 registers, in a 64 x 16 operand A of 16-bit
    numbers."""
    lane = thread % 32
    row = thread // 32 * 16 + lane // 4 + 8 * (number // 2 % 2)
    return row, number // 4 * 8 + lane % 4 * 2 + number % 2
