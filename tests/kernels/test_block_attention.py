"""block_attention: every backend that runs here, every kind, against the equations in float64."""

import pytest
import torch

from dit_accel.testing import assert_as_accurate_as, poisoned_memory
from dit_accel_kernels.block_attention import Kind, block_attention, plan_blocks, starts_of
from dit_accel_kernels.dispatch import backends, why_not
from tests.kernels.block_cases import CASES, Call, by_definition, by_torch, make

DTYPES = {"reference": [torch.float64, torch.float32, torch.float16, torch.bfloat16]}
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype)[6:]}")
    for backend in backends("block_attention")
    if backend != "flex"  # it compiles for seconds: test_block_attention_flex.py takes some of the cases
    for dtype in DTYPES.get(backend, [torch.float32, torch.float16, torch.bfloat16])
]


def run(call: Call, backend: str, lse_wanted: bool = True) -> dict[str, torch.Tensor]:
    mine = call.copy()
    reason = why_not(
        "block_attention",
        backend,
        q=call.q,
        k=call.k,
        v=call.v,
        plan=call.plan,
        key_bias=mine.options.get("key_bias"),
        lse_wanted=lse_wanted,
    )
    if reason:
        pytest.skip(f"{backend}: {reason}")
    with poisoned_memory():
        out, lse = block_attention(
            call.q, call.k, call.v, call.plan, backend=backend, lse_wanted=lse_wanted, **mine.options
        )
    return (
        {"out": out}
        | ({"lse": lse} if lse_wanted else {})
        | {n: mine.options.get(n) for n in ("cached", "cached_lse")}
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@torch.no_grad()
def test_every_backend_is_as_accurate_as_plain_torch(backend, dtype, case):
    call = make(CASES[case], dtype)
    ours, exact, plain = run(call, backend, backend != "flex"), by_definition(call), by_torch(call)
    for name in ("out", "lse", "cached", "cached_lse"):
        if exact[name] is None or name not in ours:
            continue
        infinite = exact[name].isinf()
        assert torch.equal(ours[name].isinf(), infinite), name
        known = ~(exact[name].isnan() | infinite)
        assert torch.equal(ours[name].isnan(), exact[name].isnan()), name
        if known.any():
            assert_as_accurate_as(ours[name][known], plain[name][known], exact[name][known])


@torch.no_grad()
def test_a_full_pass_that_emits_and_a_sparse_pass_that_uses_it_give_full_attention():
    call = make(CASES["all_kinds"], torch.float64)
    q, k, v = call.q[:, :, :2], call.k[:, :, :2], call.v[:, :, :2]
    lists = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    starts = starts_of(391)

    def plan(*kinds):
        return plan_blocks(lists, starts, starts, kinds)

    cached, cached_lse = (
        torch.full((2, 391, 2, 64), float("nan"), dtype=torch.float64),
        torch.zeros(2, 391, 2),
    )
    cached_lse = cached_lse.double()
    emit = plan(Kind.EMIT_TAIL, Kind.EMIT_RESIDUAL)
    full, _ = block_attention(q, k, v, emit, cached=cached, cached_lse=cached_lse)
    again, _ = block_attention(q, k, v, plan(Kind.MERGE, Kind.ADD), cached=cached, cached_lse=cached_lse)
    dense = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(full, dense.transpose(1, 2))
    torch.testing.assert_close(again, full)


def test_longest_work_comes_first_and_skipped_heads_have_none():
    lists = torch.tensor([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    plan = plan_blocks(
        lists,
        torch.tensor([0, 128, 130]),
        starts_of(300),
        [Kind.ATTEND, Kind.SKIP, Kind.COPY, Kind.EMIT_TAIL],
        [0, 0, 1, 1],
    )
    assert plan.work.tolist() == [[0, 1], [3, 0], [3, 1], [0, 0], [2, 0], [2, 1]]
    assert plan.slot.tolist() == [-1, -1, 0, 1] and plan.num_cached == 2
    assert plan.pairs == 10 and plan.density == 10 / 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": (1, 299, 2, 64)}, "the plan is for 300 queries, 300 keys and 2 heads; got 299, 300 and 2"),
        ({"k": (1, 300, 2, 32)}, r"q must be \[B, Nq, H, D\].*got q \[1, 300, 2, 64\], k \[1, 300, 2, 32\]"),
        ({"valid_keys": (2,)}, r"valid_keys must be \[1\]; got \[2\]"),
        ({"key_bias": (1, 3, 300)}, r"key_bias must be .*; got \[1, 3, 300\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_shapes_that_do_not_fit_are_named(change, said):
    starts = starts_of(300)
    plan = plan_blocks(torch.ones(2, 3, 3), starts, starts, [Kind.ATTEND] * 2)
    arguments = {n: torch.zeros(change.get(n, (1, 300, 2, 64))) for n in ("q", "k", "v")}
    extra = {n: torch.zeros(shape) for n, shape in change.items() if n not in arguments}
    with pytest.raises(ValueError, match=said):
        block_attention(*arguments.values(), plan, **extra)


@pytest.mark.parametrize("kind", [Kind.COPY, Kind.MERGE, Kind.EMIT_TAIL, Kind.SKIP])
def test_a_kind_without_its_buffer_is_named(kind):
    starts, q = starts_of(10), torch.zeros(1, 10, 1, 32)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [kind])
    with pytest.raises(
        ValueError, match=("out" if kind is Kind.SKIP else "cached") + " must be .*; got none"
    ):
        block_attention(q, q, q, plan)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k_starts": torch.tensor([0, 128, 300])}, "k_starts must rise from 0 in steps of 1 to 128 tokens"),
        ({"near": torch.ones(1, 2, 3)}, r"every list must be \[NQ, NK\] = \[3, 3\]; got near \[1, 2, 3\]"),
        ({"pattern": [1]}, r"1 heads need 1 pattern numbers below 1; got \[1\]"),
        ({"rest": torch.ones(1, 3, 3)}, "stands in the near and in the rest list"),
    ],
    ids=["starts", "lists", "pattern", "both"],
)
def test_a_plan_that_does_not_fit_together_is_refused(arguments, said):
    right = {
        "near": torch.ones(1, 3, 3),
        "q_starts": starts_of(300),
        "k_starts": starts_of(300),
        "kinds": [0],
    }
    with pytest.raises(ValueError, match=said):
        plan_blocks(**(right | arguments))


def test_gradients_are_refused_rather_than_lost():
    starts, q = starts_of(10), torch.zeros(1, 10, 1, 32, requires_grad=True)
    plan = plan_blocks(torch.ones(1, 1, 1), starts, starts, [Kind.ATTEND])
    with pytest.raises(ValueError, match="no backward"):
        block_attention(q, q, q, plan)
