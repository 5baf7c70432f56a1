"""Reuse and sharing against hooks written by hand on the plain Wan, which calls cond and uncond in turn."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.rows import build, recipe, run
from torch import Tensor

import dit_accel


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
