"""Build CUDA sources into cubins with nvcc, into the user's cache, and read what ptxas says about them.

A cubin is keyed by its sources, flags and compiler, so that a change of any builds anew; the cache is that of
`build.py`, and a file appears there whole or not at all.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dit_accel_kernels.build import SECONDS, BuildError, cache_folder

FLAGS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin")
SERIALISED = ("C7508", "C7510")  # setmaxnreg ignored; wgmma waits for each product


@dataclass(frozen=True)
class Usage:
    """What ptxas reported: registers at entry, bytes of stack and spills, and warnings that cost speed."""

    registers: int
    stack: int
    spills: int
    warnings: tuple[str, ...]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of the PATH, or of the usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def find_disassembler() -> str | None:
    """nvdisasm of DIT_ACCEL_NVDISASM, of the PATH, or of Triton's wheel."""
    found = os.environ.get("DIT_ACCEL_NVDISASM") or shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found or triton is None or triton.origin is None:
        return found
    return shutil.which("nvdisasm", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))


def nvcc_version(nvcc: str) -> str:
    """What `nvcc --version` says. Raises BuildError."""
    return _run([nvcc, "--version"]).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def source_key(sources: list[Path], flags: tuple[str, ...], compiler: str) -> str:
    """The name under which a build is kept: a hash of the sources, flags and compiler."""
    digest = hashlib.sha256()
    for part in (*(s.read_bytes() for s in sources), *(f.encode() for f in flags), compiler.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def compile_cubin(source: Path, target: Path, defines: tuple[str, ...] = ()) -> str:
    """Compile one source for sm_90a into `target`; the compiler's log. Raises BuildError with it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: set CUDA_HOME or put it on the PATH")
    run = _run([nvcc, *FLAGS, *defines, "-o", str(target), str(source)])
    return run.stdout + run.stderr


def cached_cubin(source: Path, headers: list[Path], defines: tuple[str, ...] = ()) -> Path:
    """The cubin of a source from the cache, built there at first use. Raises BuildError."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: set CUDA_HOME or put it on the PATH")
    folder = cache_folder()
    key = source_key([source, *headers], FLAGS + defines, nvcc_version(nvcc))
    target = folder / f"{source.stem}-{key}.cubin"
    if not target.exists():
        # of the same file system: the rename is atomic
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            compile_cubin(source, built, defines)
            built.chmod(0o600)
            built.replace(target)
    return target


def usage(log: str) -> Usage:
    """Numbers from a log of `ptxas -v` for one kernel."""
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, log))  # noqa: E731
    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    warnings = tuple(name for name in SERIALISED if name in log)
    return Usage(number(r"Used (\d+) registers"), number(r"(\d+) bytes stack frame"), spills, warnings)


def opcodes(cubin: Path, disassembler: str) -> Counter[str]:
    """How often each SASS instruction occurs, without its modifiers."""
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", text, re.MULTILINE)
    )


def over_budget(found: Usage, counts: Counter[str] | None, budget: dict) -> list[str]:
    """What a build breaks of a budget {registers, stack, spills, present, absent}; empty when it keeps it."""
    said = [f"{name} warned of" for name in found.warnings]
    for name in ("registers", "stack", "spills"):
        if getattr(found, name) > budget[name]:
            said.append(f"{name} {getattr(found, name)}, at most {budget[name]}")
    if counts is not None:
        said += [f"no {name}" for name in budget["present"] if not counts[name]]
        said += [f"{counts[name]} {name}" for name in budget["absent"] if counts[name]]
    return said
