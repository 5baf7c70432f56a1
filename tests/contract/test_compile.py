"""torch.compile before and after, ours and the user's: equal outputs, graphs bounded by the plain model."""

from collections.abc import Callable

import pytest
import torch
from contract.rows import ROWS, build, recipe, run

import dit_accel


class Counter:
    """A backend that runs the graph as it is and counts the graphs it was given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def blocks_of(pipe) -> list[torch.nn.Module]:
    transformer = pipe.transformer
    return list(getattr(transformer, "blocks", None) or transformer.transformer_blocks)


def each_block(pipe, backend) -> None:
    for block in blocks_of(pipe):
        block.compile(backend=backend)


def repeated(pipe, backend) -> None:
    pipe.transformer.compile_repeated_blocks(backend=backend)


def ours(pipe, backend) -> None:
    dit_accel.compile(pipe, backend=backend)


def whole(pipe, backend) -> None:
    pipe.transformer.compile(backend=backend)


@pytest.fixture(autouse=True)
def empty_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(case: str, row: str | None, way: Callable, first: bool):
    """(latents, graphs) of a pipeline that is compiled before (`first`) or after it is accelerated."""
    torch._dynamo.reset()
    backend, pipe = Counter(), build(case)
    if first:
        way(pipe, backend)
    if row is not None:
        dit_accel.accelerate(pipe, recipe(row, case))
    if not first:
        way(pipe, backend)
    return run(pipe, case), backend.graphs


CASES = [
    ("full", "wan", repeated),
    ("window", "wan", ours),
    ("tail", "wan", ours),
    ("brick", "wan", each_block),
    ("brick", "cogvideox", whole),
    ("brick", "qwen_image", whole),
    ("coreset of queries", "wan", each_block),
    ("coresets of all kinds", "cogvideox", whole),
    ("reuse heads", "qwen_image", repeated),
    ("reuse span, stored gates", "wan", each_block),
    ("reuse span, stored gates", "cogvideox", ours),
    ("share span", "pixart_sigma", ours),
    ("mixed", "cogvideox", each_block),
]


@pytest.mark.parametrize(("row", "case", "way"), CASES)
def test_compiled_in_either_order(row: str, case: str, way: Callable):
    eager = build(case)
    dit_accel.accelerate(eager, recipe(row, case))
    expected = run(eager, case)
    _, plain_graphs = compiled(case, None, way, first=True)
    # a batched pair whose branches differ runs as two halves: another batch size, another set of graphs
    bound = plain_graphs * (2 if ROWS[row].branches_apart else 1)
    for first in (True, False):
        latents, graphs = compiled(case, row, way, first)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
        assert 0 < graphs <= bound, f"compiled first: {first}"


def test_restore_takes_compiled_code_of_ours_away_and_leaves_the_users():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    dit_accel.compile(pipe, backend="eager")
    handle.restore()
    assert all(block._compiled_call_impl is None for block in blocks_of(pipe))
    each_block(pipe, "eager")
    calls = [block._compiled_call_impl for block in blocks_of(pipe)]
    dit_accel.accelerate(pipe, recipe("reuse span, stored gates", "wan")).restore()
    assert [block._compiled_call_impl for block in blocks_of(pipe)] == calls


def test_a_place_is_one_operator_in_the_graph_of_a_whole_denoiser():
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    pipe = build("cogvideox")
    dit_accel.accelerate(pipe, recipe("brick", "cogvideox"))
    whole(pipe, backend)
    run(pipe, "cogvideox")
    assert sum("dit_accel.place" in target for target in targets) == 2  # into brick order, and back
