"""Against plain pipelines changed by hand: reuse and sharing by hooks on Wan, which calls cond and uncond in
turn, coresets by another attention function beneath each family."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from contract.rows import PIPELINES, build, names, plain, recipe, run
from methods.coreset_oracle import coreset_attention
from torch import Tensor

import dit_accel
from dit_accel.recipe import Recipe


class Loop:
    """Step and branch of the forward in progress, by counting."""

    def __init__(self, pipe: Any):
        self.calls = -1
        pipe.transformer.register_forward_pre_hook(self.advance)

    def advance(self, *_: Any) -> None:
        self.calls += 1

    @property
    def step(self) -> int:
        return self.calls // 2

    @property
    def branch(self) -> str:
        return ("cond", "uncond")[self.calls % 2]


def by_hand(answer: Callable[[Loop, dict, str, Tensor], Tensor], heads: slice) -> Tensor:
    """The plain pipeline with the heads of every self-attention replaced before the output projection."""
    pipe = build("wan")
    loop, stored = Loop(pipe), {}
    for number, block in enumerate(pipe.transformer.blocks):

        def replace(_: Any, inputs: tuple[Tensor, ...], number: int = number) -> tuple[Tensor]:
            (x,) = inputs
            by_head = x.unflatten(2, (4, -1)).clone()
            by_head[:, :, heads] = answer(loop, stored, str(number), by_head[:, :, heads])
            return (by_head.flatten(2),)

        block.attn1.to_out[0].register_forward_pre_hook(replace)
    return run(pipe, "wan")


def reuse(loop: Loop, stored: dict, site: str, own: Tensor) -> Tensor:
    if loop.step % 3 == 0:
        stored[site, loop.branch] = own.clone()
    return stored[site, loop.branch]


def share(loop: Loop, stored: dict, site: str, own: Tensor) -> Tensor:
    if loop.branch == "cond":
        stored[site, "cond"] = own.clone()
        return own
    if loop.step % 3 == 0:
        stored[site, "difference"] = own - stored[site, "cond"]
        return own
    return stored[site, "cond"] + stored[site, "difference"]


def copy(loop: Loop, stored: dict, site: str, own: Tensor) -> Tensor:
    if loop.branch == "cond":
        stored[site] = own.clone()
    return stored[site]


@pytest.mark.parametrize(
    ("row", "answer", "heads"),
    [
        ("reuse heads", reuse, slice(1, None, 2)),
        ("share heads", share, slice(2, None)),
        ("share heads, copy", copy, slice(2, None)),
    ],
)
def test_heads(row: str, answer: Callable, heads: slice):
    pipe = build("wan")
    dit_accel.accelerate(pipe, recipe(row, "wan"))
    torch.testing.assert_close(run(pipe, "wan"), by_hand(answer, heads), rtol=1e-4, atol=1e-4)


def span_by_hand(computes: str, shares: bool) -> Tensor:
    """Blocks 1 and 2 answered by their old residual, or uncond by cond's and the old difference."""
    pipe = build("wan")
    loop, stored, blocks = Loop(pipe), {}, pipe.transformer.blocks
    forward = [block.forward for block in blocks]

    def first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stored["input"] = x
        return forward[1](x, *args, **kwargs)

    def last(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before, own = stored["input"], forward[2](x, *args, **kwargs) - stored["input"]
        fresh = computes[loop.step] == "C"
        if fresh or (shares and loop.branch == "cond"):
            stored[loop.branch] = own
            if fresh and loop.branch == "uncond":
                stored["difference"] = own - stored["cond"]
            return before + own
        return before + (stored["cond"] + stored["difference"] if shares else stored[loop.branch])

    blocks[1].forward, blocks[2].forward = first, last
    return run(pipe, "wan")


@pytest.mark.parametrize(
    ("row", "computes", "shares"),
    [("reuse span, stored gates", "CRRCRRCRC", False), ("share span", "CssCssCsC", True)],
)
def test_spans(row: str, computes: str, shares: bool):
    pipe = build("wan")
    dit_accel.accelerate(pipe, recipe(row, "wan"))
    torch.testing.assert_close(run(pipe, "wan"), span_by_hand(computes, shares), rtol=1e-4, atol=1e-4)


GRIDS = {case: (1 if case in ("pixart_sigma", "qwen_image") else 3, 4, 5) for case in PIPELINES}
CORESETS = {  # queries, keys, reweight
    "queries": ("selected", "all", True),
    "as published for Wan": ("selected", "as_queries", False),
    "as published for HunyuanVideo": ("selected", "selected", False),
    "both, with votes": ("selected", "as_queries", True),
    "keys": ("all", "selected", True),
}
CORESET = """
schema = 1
[choices]
k = {{ method = "coreset", queries = "{}", keys = "{}", reweight = {} }}
[attention.both]
"{blocks}.*.{attn}" = ["k"]
"""


def run_beneath(
    monkeypatch: pytest.MonkeyPatch, case: str, answer: Callable[..., Tensor]
) -> tuple[Tensor, int]:
    """Latents of the plain pipeline whose self-attention is answered by hand, and how often it was."""
    dense, pipe, visual = torch.nn.functional.scaled_dot_product_attention, build(case), prod(GRIDS[case])
    answered = 0

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *rest: Any, **more: Any
    ) -> Tensor:
        nonlocal answered
        q, k, v = query, key, value  # some callers name them
        if q.shape[2] != k.shape[2] or q.shape[2] < visual:
            return dense(q, k, v, attn_mask, *rest, **more)
        assert attn_mask is None
        answered += 1
        out = answer(*(x.transpose(1, 2).double() for x in (q, k, v)), num_text=q.shape[2] - visual)
        return out.transpose(1, 2).to(q.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        return run(pipe, case), answered


@pytest.mark.parametrize("case", PIPELINES)
@pytest.mark.parametrize("name", CORESETS)
def test_coresets(monkeypatch: pytest.MonkeyPatch, case: str, name: str):
    """Every self-attention of the plain pipeline by the paper's words, after its norms and RoPE."""
    queries, keys, reweight = CORESETS[name]

    def answer(q: Tensor, k: Tensor, v: Tensor, num_text: int) -> Tensor:
        return coreset_attention(q, k, v, GRIDS[case], (2, 3, 2), 6, *CORESETS[name], num_text=num_text)

    pipe = build(case)
    text = CORESET.format(queries, keys, str(reweight).lower(), **names(case))
    handle = dit_accel.accelerate(pipe, Recipe.from_text(text))
    found = run(pipe, case)
    assert set(handle.report().counters) == {"coreset"}
    expected, answered = run_beneath(monkeypatch, case, answer)
    assert answered >= 9 * 3  # steps and layers, once or twice each
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain(case)).abs().max() > 1e-2
