"""Fitted answers name the values of either branch, in a batched pair too."""

import pytest
import torch
from contract.rows import build, levels, run
from torch import Tensor

import dit_accel
from dit_accel.recipe import Recipe

TEXT = """schema = 1
[made_for]
steps = 9
[choices]
C = {{ method = "compute" }}
L = {{ method = "fitted" }}
[timeline.both]
denoiser = "CCLCCLCCC"
[weights]
levels = [{levels}]
[weights.cond.denoiser]
2 = {{ c1 = -1.0, u1 = 2.0 }}
5 = {{ c4 = 0.5, u4 = 0.5, c3 = 0.25, u3 = -0.25 }}
[weights.uncond.denoiser]
2 = {{ c1 = -1.0, u1 = 2.0 }}
5 = {{ c4 = 0.5, u4 = 0.5, c3 = 0.25, u3 = -0.25 }}
"""


@pytest.mark.parametrize("case", ["pixart_sigma", "cogvideox", "wan"])
def test_one_sum_for_both_branches_is_the_same_answer(case: str):
    pipe, outputs = build(case), []
    hook = pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0].clone()))
    recipe = Recipe.from_text(TEXT.format(levels=levels(case)))
    with dit_accel.accelerated(pipe, recipe, strict=True):
        run(pipe, case)
    hook.remove()
    cond, uncond = _branches(case, outputs)
    torch.testing.assert_close(cond[2], 2 * uncond[1] - cond[1])
    torch.testing.assert_close(cond[5], (cond[4] + uncond[4]) / 2 + (cond[3] - uncond[3]) / 4)
    assert torch.equal(cond[2], uncond[2]) and torch.equal(cond[5], uncond[5])
    assert not torch.equal(cond[4], uncond[4])


def _branches(case: str, outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    if case == "wan":
        return outputs[0::2], outputs[1::2]
    return [out.chunk(2)[1] for out in outputs], [out.chunk(2)[0] for out in outputs]
