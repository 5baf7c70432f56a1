"""Keys and values of cross-attention: equal bits, once per prompt, branch and run, within the bound."""

import pytest
import torch
from contract.rows import build, during_step, plain, recipe, run
from exact.cases import tables

import dit_accel
from dit_accel.testing import TINY

CASES = ("wan", "wan22", "wan_i2v", "wan_ti2v", "pixart_sigma", "pixart_alpha")
WITH_ROWS = ("share heads", "share span", "reuse module", "brick", "mixed")


def projections(pipe) -> list[torch.nn.Module]:
    blocks = getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks
    return [child for block in blocks for child in (block.attn2.to_k, block.attn2.to_v)]


@pytest.mark.parametrize("case", CASES)
def test_computed_once_per_branch_and_counted_as_memory(case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, tables(modulation=False))
    calls = []
    hooks = [child.register_forward_hook(lambda *_: calls.append(1)) for child in projections(pipe)]
    for seed in (0, 1, 0):
        latents = run(pipe, case, prompt_seed=seed)
        report = handle.report()
        assert report.memory_bytes == report.predicted_bytes > 0
        assert report.exact["text k/v served"] > report.exact["text k/v computed"] > 0
        if seed == 0:
            assert torch.equal(latents, plain(case))
    for hook in hooks:
        hook.remove()
    assert torch.equal(run(pipe, case, guidance=1.0), run(build(case), case, guidance=1.0))


@pytest.mark.parametrize("case", ["wan", "pixart_sigma"])
def test_the_projections_do_not_run_again(case: str):
    pipe = build(case)
    dit_accel.accelerate(pipe, tables(modulation=False))

    def spoil():
        for child in projections(pipe):
            child.weight.data.fill_(float("nan"))

    with during_step(pipe, 2, spoil):
        assert torch.equal(run(pipe, case), plain(case))
    assert not run(pipe, case).isfinite().all()  # never across runs


@pytest.mark.parametrize("row", WITH_ROWS)
@pytest.mark.parametrize("case", ["wan", "pixart_sigma"])
def test_beside_other_methods(row: str, case: str):
    wish = "[exact]\nmodulation = {}\ntext_kv = {}\n"
    outputs = []
    for words in (("false", "false"), ("true", "true")):
        pipe = build(case)
        handle = dit_accel.accelerate(pipe, recipe(row, case, extra=wish.format(*words)))
        outputs.append([run(pipe, case), run(pipe, case, prompt_seed=1, steps=10)])
        assert handle.report().memory_bytes == handle.report().predicted_bytes
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    assert handle.report().exact["text k/v served"] > 0


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_may_change_the_prompt(in_place: bool):
    def change(pipe, step, time, given):
        if step == 3:
            given["prompt_embeds"] = (
                given["prompt_embeds"].mul_(0.5) if in_place else given["prompt_embeds"] * 0.5
            )
        return given

    outputs = []
    for wish in (None, tables()):
        pipe = build("wan")
        if wish is not None:
            dit_accel.accelerate(pipe, wish)
        more = {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }
        outputs.append(run(pipe, "wan", **more))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], plain("wan"))


def test_a_weight_changed_in_mid_run():
    outputs = []
    for wish in (None, tables()):
        pipe = build("wan")
        if wish is not None:
            dit_accel.accelerate(pipe, wish)
        with during_step(pipe, 3, lambda pipe=pipe: projections(pipe)[0].weight.mul_(1.5)):
            outputs.append(run(pipe, "wan"))
    assert torch.equal(*outputs) and not torch.equal(outputs[0], plain("wan"))


def test_fused_projections():
    outputs = []
    for wish in (None, tables()):
        pipe = build("wan")
        pipe.transformer.fuse_qkv_projections()
        handle = dit_accel.accelerate(pipe, wish) if wish else None
        outputs.append(run(pipe, "wan"))
    assert torch.equal(*outputs)
    assert handle is not None and handle.report().exact["text k/v served"] > 0


def test_inference_tensors_are_not_trusted():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, tables())
    with torch.inference_mode():
        latents = run(pipe, "wan")
    assert torch.equal(latents, plain("wan"))
    assert "inference tensor" in handle.report().exact["text k/v"]
    assert handle.report().exact["rows served"] > 0


def test_the_memory_bound_counts_them():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, tables())
    run(pipe, "wan")
    needed = handle.report().memory_bytes / 2**30
    for bound, stored in ((needed * 1.01, True), (needed * 0.99, False)):
        limits = f"[limits]\nmemory_gb = {bound}\n"
        handle = dit_accel.accelerate(pipe, tables(extra=limits), replace=True)
        assert torch.equal(run(pipe, "wan"), plain("wan"))
        assert ("text k/v served" in handle.report().exact) == stored
        assert stored or "memory_gb" in handle.report().exact["text k/v"]


def test_auto_stores_where_the_text_is_a_share_of_the_work():
    window = (
        '[choices]\nw = {method = "window", radius = [0, 1, 1]}\n[attention.both]\n"{}.*.attn1" = ["w"]\n'
    )
    pipe = build("wan_i2v")  # 512 tokens of text for 60 of video
    handle = dit_accel.accelerate(pipe, tables("auto", "auto", window.replace("{}", "blocks")))
    run(pipe, "wan_i2v", steps=2)
    assert handle.report().exact["text k/v served"] > 0
    case = TINY["pixart_sigma"]
    pipe = build("pixart_sigma")
    handle = dit_accel.accelerate(pipe, tables("auto", "auto", window.replace("{}", "transformer_blocks")))
    case.call(pipe, steps=1, height=512, width=512)  # 7 tokens of text for 1024 of the image
    assert "auto" in handle.report().exact["text k/v"]
