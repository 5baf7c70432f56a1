"""What this machine and its libraries are called, for results and for `dit-accel doctor`."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("dit_accel", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; absent ones are left out."""
    found = {name: version_of(name) for name in LIBRARIES}
    return {"python": platform.python_version()} | {name: each for name, each in found.items() if each}


def version_of(distribution: str) -> str | None:
    """An installed distribution's version, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """The accelerator by its name, or the processor and the threads torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
