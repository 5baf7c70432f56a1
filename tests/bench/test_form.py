"""Dense in its fastest ordinary form."""

import pytest
import torch

from dit_accel import compat
from dit_accel.bench import form
from dit_accel.bench.form import Form, Wanted, blocks_compiled, fastest
from dit_accel.compare import Job
from dit_accel.errors import BadUsage
from dit_accel.generate import call_arguments
from dit_accel.loading import Place, load


def test_what_there_is_to_choose_from():
    both = [Form("float32"), Form("bfloat16")]
    assert Wanted(device="cpu").candidates(None) == both
    assert Wanted(device="cpu").candidates("float16") == [Form("float16")]
    assert Wanted("compiled", "bfloat16", "cpu").candidates("float32") == [Form("bfloat16", compiled=True)]
    with pytest.raises(BadUsage, match="--dense fast"):
        Wanted("fast")


def test_on_a_gpu_compiled_blocks_are_tried(monkeypatch):
    monkeypatch.setattr(form, "pick_device", lambda name: torch.device("cuda"))
    assert Wanted().candidates(None) == [Form("bfloat16"), Form("bfloat16", compiled=True)]
    assert Wanted(dense="eager").candidates(None) == [Form("bfloat16")]


@pytest.mark.parametrize("winner", ["float32", "bfloat16"])
def test_the_fastest_wins_and_its_model_is_the_one_that_is_given(winner, tiny_folder, monkeypatch):
    said: list[str] = []

    def reload(dtype):
        model = load(str(tiny_folder("pixart_sigma")), Place("cpu", dtype))
        return model, call_arguments(model, {"steps": 1})

    monkeypatch.setattr(form, "_seconds_of_a_step", lambda m, a, j, f: 1.0 if f.dtype == winner else 2.0)
    chosen, model, _ = fastest(
        Wanted(device="cpu").candidates(None), reload, lambda model: Job("a fox", 0), said.append
    )
    assert chosen == Form(winner) and model.pipe.transformer.dtype == getattr(torch, winner)
    assert f"All columns run in {winner}, eager" in said[0]


def test_a_step_is_timed_in_the_form(tiny_folder):
    model = load(str(tiny_folder("wan")), Place("cpu", "float32"))
    assert (
        form._seconds_of_a_step(model, call_arguments(model, {"steps": 2}), Job("a fox", 0), Form("float32"))
        > 0
    )


def test_blocks_are_compiled_inside_only(tiny_folder):
    model = load(str(tiny_folder("wan")), Place("cpu", "float32"))
    with blocks_compiled(model, active=True):
        assert all(compat.compiled_call(block) is not None for block in model.pipe.transformer.blocks)
    assert not [each for each in model.pipe.transformer.modules() if compat.compiled_call(each) is not None]
    with blocks_compiled(model, active=False):
        assert compat.compiled_call(model.pipe.transformer.blocks[0]) is None
