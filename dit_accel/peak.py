"""Peak memory of one piece of work: the device allocator's on CUDA, the process's resident set on a CPU."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """What was measured, in bytes; None where this system cannot tell."""

    measured: str  # the quantity, for a reader
    bytes_: int | None = None  # the highest level reached
    growth: int | None = None  # how far above the level at the start


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measure the work inside; the values stand in the yielded record when it closes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        peak = Peak("CUDA bytes allocated, at their peak")
        yield peak
        peak.bytes_ = torch.cuda.max_memory_allocated()
        peak.growth = peak.bytes_ - before
        return
    peak = Peak("resident bytes of the process, at their peak")
    before = _start_resident_peak()
    yield peak
    if before is not None:
        peak.bytes_ = _status("VmHWM")
        peak.growth = max(0, peak.bytes_ - before)


def _start_resident_peak() -> int | None:
    """Bytes resident now, the kernel's high-water mark reset to them; None where there is no such mark."""
    try:
        with contextlib.suppress(
            AttributeError
        ):  # freed arenas of an earlier run would hide this run's growth
            ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        return _status("VmRSS")
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
