"""Build a C source with the system's compiler at first use, and keep the library in the user's cache.

The cache is `$XDG_CACHE_HOME/dit_accel` or `~/.cache/dit_accel`. A library's name carries a hash of all that
it depends on: source, headers beside it and those that ops share, flags, compiler version, processor flags.
It is written under another name and renamed, so that processes that build at once never see half a file.

Never -ffast-math: it folds rounding constants away, and the results are wrong without a sign of it.
"""

import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",  # pairs of 16-bit numbers are moved as floats
    "-pthread",
)
AVX2 = ("avx2", "fma", "f16c")
AVX512 = (*AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
# what a source may be built for, widest first: names of /proc/cpuinfo, the compiler's but for a "_"
LEVELS = {"avx512_bf16": (*AVX512, "avx512_bf16"), "avx512": AVX512, "avx2": AVX2, "portable": ()}
SHARED = Path(__file__).parent  # the headers that sources of several ops include
SECONDS = 600  # a compiler that takes longer hangs


class BuildError(RuntimeError):
    """There is no usable compiler or cache, or the compiler refused; the text is the reason."""


@functools.cache
def processor_flags() -> frozenset[str]:
    """The processor's features as Linux names them; empty elsewhere, where only `portable` can be built."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def levels() -> tuple[str, ...]:
    """The levels that this processor can run, widest first."""
    return _levels(processor_flags())


@functools.cache
def _levels(flags: frozenset[str]) -> tuple[str, ...]:
    return tuple(name for name, needed in LEVELS.items() if flags.issuperset(needed))


def chosen_level() -> str:
    """The widest level, or DIT_ACCEL_CPU_LEVEL. Raises BuildError for one that cannot run here."""
    level = os.environ.get("DIT_ACCEL_CPU_LEVEL") or levels()[0]
    if level not in levels():
        raise BuildError(
            f'DIT_ACCEL_CPU_LEVEL is "{level}", and this processor runs only {", ".join(levels())}'
        )
    return level


def library(source: Path, level: str) -> Path:
    """The shared library of a C source for a level, built if it is not in the cache. Raises BuildError."""
    compiler = find_compiler()
    flags = [*FLAGS, *(f"-m{flag.replace('_', '')}" for flag in LEVELS[level])]
    folder = cache_folder()
    built = folder / f"{source.stem}-{level}-{_key(source, compiler, flags)}.so"
    if not built.is_file():
        _compile([*compiler, *flags, str(source)], built)
    return built


def find_compiler() -> list[str]:
    """The command of $CC, or of the first of cc, gcc and clang that is installed. Raises BuildError."""
    asked = os.environ.get("CC", "").split()
    if asked:
        if not shutil.which(asked[0]):
            raise BuildError(f'CC is "{asked[0]}", which is not installed')
        return asked
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C compiler: install gcc or clang, or set CC")


def cache_folder() -> Path:
    """The cache, made if missing; one that others can write to could hold anything. Raises BuildError."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "dit_accel"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be made: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(
            f"the cache {folder} is not a folder that only you can write to: mend its owner and its mode, "
            "or set XDG_CACHE_HOME"
        )
    return folder


def _key(source: Path, compiler: list[str], flags: list[str]) -> str:
    headers = [*sorted(source.parent.glob("*.h")), *sorted(SHARED.glob("*.h"))]
    parts = [source.read_bytes(), *(header.read_bytes() for header in headers)]
    parts += [" ".join(flags).encode(), " ".join(compiler).encode(), _version(tuple(compiler)).encode()]
    parts += [" ".join(sorted(processor_flags())).encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:20]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"]).stdout


def _compile(command: list[str], built: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", prefix=f".{built.stem}-", dir=built.parent)
    os.close(handle)
    try:
        done = _run([*command, "-o", temporary, "-lm", "-ldl"])
        if done.returncode:
            last = " | ".join(done.stderr.strip().splitlines()[-5:])
            raise BuildError(f"{command[0]} ended with status {done.returncode}: {last}")
        os.replace(temporary, built)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
