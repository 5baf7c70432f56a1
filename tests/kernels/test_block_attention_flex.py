"""Compiled flex_attention as a backend: a few shapes, since each takes seconds to compile."""

import pytest
import torch
from torch._dynamo.utils import counters

from dit_accel_kernels.block_attention import Kind, block_attention, flex, gathered
from dit_accel_kernels.dispatch import BackendUnavailable
from tests.kernels import test_block_attention as every_backend
from tests.kernels.block_cases import Case, make

SMALL = Case((70, 70), 32, (Kind.ATTEND,), block=32)


def tensors_of(call):
    return {"q": call.q, "k": call.k, "v": call.v, "plan": call.plan}


@pytest.fixture(autouse=True)
def nothing_failed_before():
    flex._failed.clear()
    flex._no_compiler.cache_clear()
    yield
    flex._failed.clear()
    flex._no_compiler.cache_clear()


@pytest.mark.parametrize("case", ["odd", "ragged_inside", "padding_of_all_heads", "without_lse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_as_accurate(dtype, case):
    every_backend.test_every_backend_is_as_accurate_as_plain_torch("flex", dtype, case)


@torch.no_grad()
def test_a_shape_is_compiled_once():
    seen = []
    for seed in (0, 1, 2):
        call = make(SMALL, torch.float32, seed)  # other data, another plan
        block_attention(call.q, call.k, call.v, call.plan, backend="flex", lse_wanted=False)
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[0] == seen[1] == seen[2] > 0


@torch.no_grad()
def test_what_it_cannot_has_a_reason(monkeypatch):
    call = make(SMALL, torch.float32)
    tensors = tensors_of(call)
    assert flex.why_not(**tensors) == (
        "compiled flex_attention returns no LSE on a CPU, and the call asks for it"
    )
    assert flex.why_not(**tensors, lse_wanted=False) is None
    monkeypatch.setenv("CXX", "nonesuch")
    flex._no_compiler.cache_clear()
    assert 'C++ compiler, and "nonesuch"' in flex.why_not(**tensors, lse_wanted=False)


@torch.no_grad()
def test_where_it_does_not_compile_auto_goes_on_and_a_name_raises(monkeypatch):
    def refuse(shapes):
        def call(*given):
            raise RuntimeError("cc1plus: out of memory")

        return call

    monkeypatch.setattr(flex, "_compiled", refuse)
    monkeypatch.setenv("DIT_ACCEL_CPU_LEVEL", "nonesuch")  # no C backend either
    taken = []
    inner = gathered.block_attention
    monkeypatch.setattr(gathered, "block_attention", lambda *given: taken.append(inner(*given)))
    call = make(Case((512, 512), 32, (Kind.ATTEND,)), torch.float32)
    with pytest.raises(BackendUnavailable, match="could not be compiled: cc1plus"):
        block_attention(call.q, call.k, call.v, call.plan, backend="flex", lse_wanted=False)
    assert "512 tokens are not worth" in flex.why_not_auto(**tensors_of(make(SMALL, torch.float32)))
    flex._failed.clear()
    with pytest.warns(UserWarning, match='slower backend "gathered" here.*nonesuch.*cc1plus'):
        block_attention(call.q, call.k, call.v, call.plan, lse_wanted=False)
    assert len(taken) == 1
