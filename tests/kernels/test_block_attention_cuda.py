"""block_attention's Hopper backend without a device: all up to the driver, and what is refused.

A machine in numpy (`hopper_machine.py`) executes each launch from the addresses, strides and lists that it is
handed, so a field in the wrong place gives wrong numbers here.
"""

import contextlib
import ctypes as c
import dataclasses
import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from dit_accel.testing import assert_as_accurate_as, poisoned_memory
from dit_accel_kernels.block_attention import (
    Kind,
    block_attention,
    cuda,
    cuda_builds,
    cuda_launch,
    plan_blocks,
    starts_of,
)
from dit_accel_kernels.cuda_build import BuildError, find_nvcc
from dit_accel_kernels.cuda_driver import BFLOAT16, FLOAT16
from dit_accel_kernels.dispatch import BackendUnavailable
from tests.kernels.block_cases import CASES, Call, Case, by_definition, by_torch, make
from tests.kernels.hopper_machine import Machine

FOLDER = Path(cuda.__file__).parent
ANSWERED = [name for name in CASES if name != "all_kinds"]  # the other cases of all kinds say as much, sooner
RUNS = [
    pytest.param(name, width, dtype, id=f"{name}-{width}-{str(dtype)[6:]}")
    for name, width, dtype in zip(
        ANSWERED, itertools.cycle((64, 128)), itertools.cycle((torch.bfloat16,) * 2 + (torch.float16,) * 2)
    )
]


@pytest.fixture
def machine(monkeypatch):
    """A Hopper device of seven multiprocessors on which tensors of the CPU lie."""
    found = Machine()
    monkeypatch.setattr(cuda, "driver", lambda: found)
    monkeypatch.setattr(cuda, "_no_device", lambda: None)
    monkeypatch.setattr(cuda, "_device_of", lambda q: "sm_90")
    monkeypatch.setattr(cuda, "_kernel", lambda ordinal, build: (build,))
    monkeypatch.setattr(cuda, "_multiprocessors", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = type("Stream", (), {"cuda_stream": 0x5})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return found


def results(call: Call, gaps: bool = False) -> dict[str, torch.Tensor]:
    """Of the backend; with gaps, into rows that lie further apart than they are wide."""
    mine = call.copy()
    for name in ("out", "cached", "cached_lse") if gaps else ():
        *shape, last = mine.options[name].shape
        wide = torch.full((*shape, last + 32), float("nan"), dtype=mine.options[name].dtype)
        mine.options[name] = wide[..., :last].copy_(mine.options[name])
    with poisoned_memory():
        out, lse = block_attention(call.q, call.k, call.v, call.plan, backend="cuda", **mine.options)
    return {"out": out, "lse": lse} | {n: mine.options.get(n) for n in ("cached", "cached_lse")}


@pytest.mark.parametrize(("name", "width", "dtype"), RUNS)
@torch.no_grad()
def test_a_launch_holds_all_that_the_result_needs(machine, name, width, dtype):
    call = make(dataclasses.replace(CASES[name], width=width), dtype)
    compare(results(call), call)
    assert len(machine.launches) == 1


@torch.no_grad()
def test_rows_may_lie_apart_and_one_bias_may_serve_all(machine):
    call = make(Case((40, 50), 64, tuple(Kind), batch=2), torch.float16)
    call.options["key_bias"] = torch.rand(1, 1, 50, generator=torch.Generator().manual_seed(0)).log()
    compare(results(call, gaps=True), call)


def compare(ours: dict[str, torch.Tensor], call: Call) -> None:
    exact, plain = by_definition(call), by_torch(call)
    for key in (key for key in exact if exact[key] is not None):
        unknown, infinite = exact[key].isnan(), exact[key].isinf()
        assert torch.equal(ours[key].isnan(), unknown) and torch.equal(ours[key].isinf(), infinite), key
        known = ~(unknown | infinite)
        if known.any():
            assert_as_accurate_as(ours[key][known], plain[key][known], exact[key][known])


def test_the_grid_is_persistent_and_no_larger_than_the_work(machine):
    results(make(CASES["odd"], torch.float16))  # 2 samples, 2 heads, 3 blocks
    results(make(dataclasses.replace(CASES["one_token"], width=64), torch.float16))
    shared = cuda_builds.build_for(64, "fp16").shared_bytes
    assert machine.launches[0] == {"grid": 7, "block": 384, "shared": shared, "stream": 5}
    assert machine.launches[1]["grid"] == 1


def test_a_plan_without_work_launches_nothing(machine):
    call = make(CASES["all_kinds"], torch.float16)
    plan = plan_blocks(torch.ones(1, 1, 1), starts_of(9), starts_of(9), [Kind.SKIP])
    q = call.q[:1, :9, :1]
    block_attention(q, q, q, plan, out=torch.zeros_like(q), backend="cuda")
    assert machine.launches == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for arguments.h")
def test_the_arguments_lie_as_the_kernel_reads_them(tmp_path):
    fields = [name for name, *_ in cuda_launch.Arguments._fields_]
    offsets = ",".join(f"offsetof(struct Arguments,{name})" for name in fields)
    source = f'#include <stddef.h>\n#include <stdio.h>\n#include "{FOLDER}/arguments.h"\n'
    source += f"int main(){{size_t a[]={{{offsets},sizeof(struct Arguments)}};"
    source += 'for(unsigned i=0;i<sizeof(a)/sizeof(*a);i++)printf("%zu ",a[i]);}'
    (tmp_path / "a.c").write_text(source)
    subprocess.run(["cc", tmp_path / "a.c", "-o", tmp_path / "a"], check=True)
    printed = subprocess.run([tmp_path / "a"], capture_output=True, text=True, check=True).stdout
    ours = [getattr(cuda_launch.Arguments, name).offset for name in fields]
    assert list(map(int, printed.split())) == [*ours, c.sizeof(cuda_launch.Arguments)]


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
def test_the_compiled_kernel_takes_three_maps_and_the_arguments():
    """Read from the cubin: KPARAM_INFO (0x17) tells each parameter's place and, from bit 18 on, its size."""
    image = cuda_builds.find_cubin(cuda_builds.build_for(128, "bf16")).read_bytes()
    found, at = set(), image.find(b"\x04\x17\x0c\x00")
    while at >= 0:
        _, ordinal, offset, flags = struct.unpack_from("<IHHI", image, at + 4)
        found.add((ordinal, offset, flags >> 18))
        at = image.find(b"\x04\x17\x0c\x00", at + 1)
    arguments = c.sizeof(cuda_launch.Arguments)
    start = min(offset for _, offset, _ in found)  # the first map is put at a multiple of 64
    assert {(ordinal, offset - start, size) for ordinal, offset, size in found} == {
        *((i, 128 * i, 128) for i in range(3)),
        (3, 384, arguments),
    }


def test_a_map_says_where_a_strided_tensor_lies():
    packed = torch.zeros(2, 300, 4, 136, dtype=torch.bfloat16)
    t = packed[..., 8:]  # [B, N, H, D]
    sizes, steps = (128, 300, 4, 2), (4 * 272, 272, 300 * 4 * 272)
    expected = (BFLOAT16, packed.data_ptr() + 16, sizes, steps, (64, 128, 1, 1))
    assert cuda_launch.tensor_map(t, False) == expected
    one = cuda_launch.tensor_map(torch.zeros(1, 9, 1, 64).half().expand(3, -1, -1, -1), True)
    assert one[0] == FLOAT16 and one[2:4] == ((64, 9, 1, 1), (128, 128, 128))


def call(dtype=torch.float16, width=64, block=128, **others) -> dict:
    starts, q = starts_of(10, block), torch.zeros(2, 10, 2, width, dtype=dtype)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [Kind.ATTEND] * 2, [0, 0], block=block)
    return {"q": q, "k": q, "v": q, "plan": plan} | others


OPTIONS = ("cached", "cached_lse", "key_bias", "valid_keys")
KERNEL = cuda._kernel.__wrapped__  # tries anew at every call
half = torch.zeros(2, 10, 2, 72).half()
REFUSED = {
    "dtype": (call(torch.float32), "one dtype, bfloat16 or float16; got float32, float32, float32"),
    "mixed": (call(k=half[..., :64].bfloat16()), "got float16, bfloat16, float16"),
    "width": (call(width=96), "head width 96 is none of 64, 128"),
    "block": (call(block=256), "blocks of 256 tokens are over 128"),
    "strides": (call(q=torch.zeros(2, 10, 2, 68).half()[..., :64]), "q has its heads 136 bytes apart"),
    "start": (call(v=torch.zeros(2, 10, 2, 72).half()[..., 1:65]), "v starts at no multiple of 16 bytes"),
    "step": (call(q=torch.zeros(2, 10, 2, 128).half()[..., ::2]), "head width of q is not contiguous"),
    "heads": (call(k=half[:, :, :1, :64].expand(-1, -1, 2, -1)), "k has its heads 0 bytes apart"),
    "samples": (call(k=half[:1, ..., :64].expand(2, -1, -1, -1)), "k and v disagree"),
    "out type": (call(out=torch.zeros(2, 10, 2, 64)), "out is float32 and q float16"),
    "out rows": (call(out=torch.zeros(2, 10, 2, 65).half()[..., :64]), "out has rows that start at no"),
    "cached": (call(cached=half.mT.contiguous().mT), "the head width of cached is not contiguous"),
    "cached lse": (call(cached_lse=torch.zeros(2, 10, 1).double()), "cached_lse is not float32"),
    "device": (call(out=torch.zeros(2, 10, 2, 64, device="meta").half()), "its tensors are on cpu, meta"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_take_is_said(machine, why):
    tensors, said = REFUSED[why]
    assert said in (cuda.why_not(**tensors) or "")


def test_it_takes_what_the_reasons_leave(machine):
    assert cuda.why_not(**call()) is None
    assert cuda.why_not(**call(out=half[..., :64], cached=half[..., 8:], cached_lse=half.float())) is None


def test_here_the_reason_is_the_missing_device():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(BackendUnavailable, match=r"without CUDA|no CUDA device"):
        block_attention(**call(), backend="cuda")
    assert cuda.why_not() in ("this PyTorch is built without CUDA", "there is no CUDA device")


def test_another_device_is_named(machine, monkeypatch):
    monkeypatch.setattr(cuda, "_device_of", lambda q: "sm_80")
    assert cuda.why_not(**call()) == "its instructions are those of sm_90a alone; q is on sm_80"


def test_a_cubin_that_cannot_be_had_is_the_reason(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_ACCEL_CUBINS", str(tmp_path))
    monkeypatch.setattr(cuda_builds, "cached_cubin", lambda *_: (_ for _ in ()).throw(BuildError("no nvcc")))
    monkeypatch.setattr(cuda, "_kernel", KERNEL)
    build = cuda_builds.build_for(64, "fp16")
    assert cuda.why_not(**call()) == f"there is no {build.file_name} in {tmp_path}, and no nvcc"
    with pytest.raises(BuildError, match="and no nvcc"):
        cuda.block_attention(**{"out": half, "lse": half, "scale": 1.0} | call() | dict.fromkeys(OPTIONS))
    (tmp_path / build.file_name).write_bytes(b"cubin")
    assert cuda.why_not(**call()) is None
