"""The few calls of the CUDA driver API that load and launch a cubin, through ctypes: no C++, no headers.

The primary context is the one that torch uses. A failed call raises DriverError with its name.
Source: CUDA Driver API 12 and later, cuda.h.
"""

import ctypes as c
import functools

BFLOAT16, FLOAT16 = 9, 6  # CUtensorMapDataType
SWIZZLE_128B = 3  # CUtensorMapSwizzle
L2_PROMOTION_256B = 3  # CUtensorMapL2promotion
MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class TensorMap(c.Structure):
    """CUtensorMap: 128 opaque bytes that must lie at a multiple of 64, see `aligned_map`."""

    _fields_ = [("opaque", c.c_uint64 * 16)]


class LaunchConfig(c.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *(
            (n, c.c_uint)
            for n in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")
        ),
        ("stream", c.c_void_p),
        ("attributes", c.c_void_p),
        ("num_attributes", c.c_uint),
    ]


class Driver:
    """libcuda, or a stand-in with the same calls."""

    def __init__(self, library: c.CDLL):
        self.library = library
        self.contexts: dict[int, c.c_void_p] = {}  # by ordinal
        self._call("cuInit", c.c_uint(0))

    def _call(self, name: str, *arguments) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            said = c.c_char_p()
            self.library.cuGetErrorName(status, c.byref(said))
            raise DriverError(f"{name}: {(said.value or b'error').decode()} ({status})")

    def use_device(self, ordinal: int) -> None:
        """Make the primary context of a device current in this thread."""
        if ordinal not in self.contexts:  # each time it is retained, it is kept alive once more
            device, context = c.c_int(), c.c_void_p()
            self._call("cuDeviceGet", c.byref(device), c.c_int(ordinal))
            self._call("cuDevicePrimaryCtxRetain", c.byref(context), device)
            self.contexts[ordinal] = context
        self._call("cuCtxSetCurrent", self.contexts[ordinal])

    def load_function(self, cubin: bytes, name: str, shared_bytes: int) -> c.c_void_p:
        """A kernel of a cubin, allowed `shared_bytes` of dynamic shared memory."""
        module, function = c.c_void_p(), c.c_void_p()
        self._call("cuModuleLoadData", c.byref(module), c.c_char_p(cubin))
        self._call("cuModuleGetFunction", c.byref(function), module, c.c_char_p(name.encode()))
        self._call("cuFuncSetAttribute", function, c.c_int(MAX_DYNAMIC_SHARED_BYTES), c.c_int(shared_bytes))
        return function

    def launch(
        self, function, grid: int, block: int, shared_bytes: int, stream: int, arguments: list
    ) -> None:
        """Launch on a stream; `arguments` are ctypes objects, copied by the driver before this returns."""
        config = LaunchConfig(grid, 1, 1, block, 1, 1, shared_bytes, stream, None, 0)
        pointers = (c.c_void_p * len(arguments))(*(c.addressof(a) for a in arguments))
        self._call("cuLaunchKernelEx", c.byref(config), function, pointers, None)

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one driver lives as long as the process
    def tensor_map(
        self,
        data_type: int,
        pointer: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
    ) -> TensorMap:
        """The map of a tensor of 16-bit numbers: sizes, box and, from the second on, strides in bytes.

        Rows beyond the tensor read as zeros; boxes arrive under the 128-byte swizzle.
        """
        rank = len(shape)
        found = aligned_map()
        self._call(
            "cuTensorMapEncodeTiled",
            c.byref(found),
            c.c_int(data_type),
            c.c_uint32(rank),
            c.c_void_p(pointer),
            (c.c_uint64 * rank)(*shape),
            (c.c_uint64 * (rank - 1))(*strides),
            (c.c_uint32 * rank)(*box),
            (c.c_uint32 * rank)(*[1] * rank),
            *(c.c_int(n) for n in (0, SWIZZLE_128B, L2_PROMOTION_256B, 0)),  # no interleave; zeros beyond
        )
        return found


def aligned_map() -> TensorMap:
    """An empty TensorMap at a multiple of 64 bytes; it keeps its memory alive."""
    memory = c.create_string_buffer(c.sizeof(TensorMap) + 64)
    return TensorMap.from_buffer(memory, -c.addressof(memory) % 64)


@functools.cache
def driver() -> Driver:
    """The machine's driver. Raises DriverError where there is none."""
    try:
        return Driver(c.CDLL("libcuda.so.1"))
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from error
