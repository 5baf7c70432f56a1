"""block_attention under torch.compile: one graph, one node, the same result."""

import pytest
import torch

from dit_accel_kernels.block_attention import block_attention
from dit_accel_kernels.dispatch import backends, why_not
from tests.kernels.block_cases import CASES, make

RUNS = [name for name in backends("block_attention") if name in ("cpu", "reference")]


def called(call, backend):
    """A function of the tensors of a call, and the buffers that it writes."""
    buffers = call.copy().options

    def function(q, k, v):
        out, lse = block_attention(q * 2, k, v, call.plan, backend=backend, **buffers)
        return out + 1, lse

    return function, buffers


@pytest.mark.parametrize("backend", RUNS)
@torch.no_grad()
def test_compiled_code_sees_one_node_in_one_graph_and_computes_the_same(backend):
    call = make(CASES["all_kinds"], torch.float32)
    tensors = call.q, call.k, call.v
    reason = why_not("block_attention", backend, q=call.q, k=call.k, v=call.v, plan=call.plan, key_bias=None)
    if reason:
        pytest.skip(reason)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    eager, expected_buffers = called(call, backend)
    expected = eager(*tensors)
    for compiler in (keep, "aot_eager"):
        torch.compiler.reset()
        function, buffers = called(call, backend)
        found = torch.compile(function, fullgraph=True, backend=compiler)(*tensors)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(buffers, expected_buffers, rtol=0, atol=0, equal_nan=True)
    assert len(graphs) == 1
    target = torch.ops.dit_accel.block_attention
    nodes = [n for n in graphs[0].graph.nodes if "block_attention" in str(n.target)]
    assert len(nodes) == 1 and str(nodes[0].target).startswith(str(target))
