"""LoRA, fused projections, offload, casting, saving: before and after (promise 7)."""

from pathlib import Path

import pytest
import torch
from contract.rows import build, plain, recipe, run
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

import dit_accel

CASES = ("wan", "cogvideox", "pixart_sigma", "qwen_image")
ROWS = ("brick", "reuse heads", "reuse span, current gates", "share module")
PAIRS = [(row, case) for row in ROWS for case in CASES]


def add_lora(pipe, case: str, scale: float = 1.0) -> None:
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one"
    )
    pipe.transformer.set_adapters("one", scale)


def drop_lora(pipe, case: str, scale: float = 1.0) -> None:
    pipe.transformer.delete_adapters("one")


def fuse(pipe, case: str) -> None:
    pipe.transformer.fuse_qkv_projections()


def offload(pipe, case: str) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def cast(pipe, case: str) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


CHANGES = {"lora": add_lora, "fused projections": fuse, "group offload": offload, "layerwise casting": cast}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("row", "case"), PAIRS)
def test_before_and_after_are_the_same(row: str, case: str, change: str):
    """Either order gives one result, and after restoring both are the plain changed pipeline."""
    if change == "lora" and not hasattr(build(case, 1).transformer, "add_adapter"):
        pytest.skip(f"diffusers gives {case} no adapters")
    if change == "fused projections" and not hasattr(build(case, 1).transformer, "fuse_qkv_projections"):
        pytest.skip(f"{case} cannot fuse its projections")
    changed = build(case)
    CHANGES[change](changed, case)
    expected_plain = run(changed, case)
    handle = dit_accel.accelerate(changed, recipe(row, case))
    before = run(changed, case)
    handle.restore()
    assert torch.equal(run(changed, case), expected_plain)

    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe(row, case))
    unchanged = run(pipe, case)
    CHANGES[change](pipe, case)
    assert torch.equal(run(pipe, case), before)
    assert handle.report().did_something
    if change == "lora":
        assert not torch.equal(before, unchanged)
    handle.restore()
    assert torch.equal(run(pipe, case), expected_plain)


@pytest.mark.parametrize("case", [case for case in CASES if case != "pixart_sigma"])
def test_a_lora_is_rescaled_and_deleted_under_a_recipe(case: str):
    pipe = build(case)
    dit_accel.accelerate(pipe, recipe("reuse heads", case))
    bare = run(pipe, case)
    add_lora(pipe, case)
    full = run(pipe, case)
    pipe.transformer.set_adapters("one", 0.5)
    half = run(pipe, case)
    assert not torch.equal(full, half) and not torch.equal(half, bare)
    drop_lora(pipe, case)
    assert torch.equal(run(pipe, case), bare)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("row", ["window", "reuse span, current gates"])
def test_an_accelerated_pipeline_saves_as_the_plain_one(row: str, case: str, tmp_path: Path):
    pipe = build(case)
    pipe.transformer.save_pretrained(tmp_path / "plain")
    dit_accel.accelerate(pipe, recipe(row, case))
    run(pipe, case)
    pipe.transformer.save_pretrained(tmp_path / "accelerated")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "accelerated" / name).read_bytes()
    dit_accel.restore(pipe)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path / "accelerated")
    # weights read from a file lie at other addresses, and matrix products round differently there
    torch.testing.assert_close(run(pipe, case), plain(case), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["wan", "qwen_image"])
def test_an_attention_backend_set_under_a_recipe_survives_its_undo(case: str):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, recipe("window", case))
    pipe.transformer.set_attention_backend("native")
    run(pipe, case)
    handle.restore()
    names = {
        str(m.processor._attention_backend.value)
        for m in pipe.transformer.modules()
        if hasattr(m, "processor")
    }
    assert names == {"native"}
    pipe.transformer.reset_attention_backend()


def test_a_processor_that_the_user_sets_later_stays_after_the_undo():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, recipe("window", "wan"))
    attention = pipe.transformer.blocks[0].attn1
    mine = type(pipe.transformer.blocks[0].attn2.processor.originals[0])()
    attention.set_processor(mine)
    run(pipe, "wan")
    assert handle.report().did_something
    handle.restore()
    assert attention.processor is mine
