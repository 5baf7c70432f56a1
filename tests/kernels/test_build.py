"""The build of C sources: the cache, its key and permissions, two builders at once, and what failures say."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel_kernels import build
from dit_accel_kernels.block_attention import cpu

SOURCE = '#include "number.h"\nint number(void) { return NUMBER; }\n'
BUILD_IT = """
import pathlib, sys
from dit_accel_kernels import build
print(build.library(pathlib.Path(sys.argv[1]), "portable"))
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small source with a header, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "number.h").write_text("#define NUMBER 7\n")
    path = tmp_path / "number.c"
    path.write_text(SOURCE)
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return path


def number(library: Path) -> int:
    return ctypes.CDLL(str(library)).number()


def test_a_library_is_built_once_and_again_when_what_it_depends_on_changes(source, monkeypatch):
    first = build.library(source, "portable")
    assert number(first) == 7
    written = first.stat().st_mtime_ns
    assert build.library(source, "portable") == first and first.stat().st_mtime_ns == written
    source.with_name("number.h").write_text("#define NUMBER 8\n")
    second = build.library(source, "portable")
    assert second != first and number(second) == 8
    monkeypatch.setattr(build, "SHARED", source.parent / "shared")
    build.SHARED.mkdir()
    (build.SHARED / "rows.h").write_text("")  # what sources of several ops include
    third = build.library(source, "portable")
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset({"another"}))
    fourth = build.library(source, "portable")
    assert len({first, second, third, fourth}) == 4
    assert not [path for path in first.parent.iterdir() if path.name.startswith(".")], "temporary files stay"


def test_two_processes_that_build_at_once_both_get_a_whole_library(source):
    started = [
        subprocess.Popen([sys.executable, "-c", BUILD_IT, str(source)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[0].strip() for process in started]
    assert said[0] == said[1] and number(Path(said[0])) == 7
    assert len(list(Path(said[0]).parent.iterdir())) == 1


def test_the_cache_is_private_and_one_that_others_can_write_to_is_refused(source):
    folder = build.library(source, "portable").parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(build.BuildError, match=r"is not a folder that only you can write to: mend"):
        build.library(source, "portable")


def test_a_cache_of_another_user_and_a_link_are_refused(source, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache" / "dit_accel").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(build.BuildError, match="only you can write to"):
        build.cache_folder()
    (tmp_path / "cache" / "dit_accel").unlink()
    assert build.cache_folder().is_dir()
    monkeypatch.setattr(build.os, "getuid", lambda: 12345)
    with pytest.raises(build.BuildError, match="only you can write to"):
        build.cache_folder()


def test_a_build_that_fails_says_what_the_compiler_said_and_leaves_nothing(source):
    source.write_text("int number(void) { return nonsense; }\n")
    with pytest.raises(build.BuildError, match=r"ended with status 1: .*nonsense"):
        build.library(source, "portable")
    assert not list(build.cache_folder().iterdir())


def test_without_a_compiler_the_backend_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="there is no C compiler: install gcc or clang, or set CC"):
        build.find_compiler()
    monkeypatch.setenv("CC", "nonesuch -m64")
    with pytest.raises(build.BuildError, match='CC is "nonesuch", which is not installed'):
        build.library(Path(cpu.__file__).with_suffix(".c"), "portable")


def test_a_level_that_the_processor_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset(build.AVX2))
    assert build.levels() == ("avx2", "portable") and build.chosen_level() == "avx2"
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", "avx512")
    with pytest.raises(build.BuildError, match='is "avx512", and this processor runs only avx2, portable'):
        build.chosen_level()
