"""Modulation tables: equal bits in every situation, rows that are really used, and weights that may leave."""

import pytest
import torch
from contract.rows import PIPELINES, SITUATIONS, STEPS, VARIANTS, build, during_step, plain, run
from diffusers import QwenImageTransformer2DModel
from exact.cases import tables, weights_that_leave
from peft import LoraConfig

import dit_accel
from dit_accel.exact import hindrance, keys, modulation, weights
from dit_accel.exact.modulation import ModulationTables, size_of
from dit_accel.families import family_of
from dit_accel.timeline import FEW_STEPS

TABLED = [case for case in (*PIPELINES, *VARIANTS) if case != "wan_ti2v"]
WITH_ADAPTERS = {"wan": "time_proj", "cogvideox": "linear", "qwen_image": "img_mod.1"}


def tables_of(handle) -> ModulationTables:
    return handle._installation.exact._modulation["transformer"]


def projections(pipe) -> list[torch.nn.Module]:
    names = family_of(pipe.transformer).modulation.projections
    return [child.module for name in names for child in weights.children(pipe.transformer, name)]


@pytest.mark.parametrize("case", TABLED)
def test_equal_bits_in_every_situation(case: str, monkeypatch):
    pipe = build(case)
    with weights_that_leave(monkeypatch):
        handle = dit_accel.accelerate(pipe, tables())
        # a variant differs from its family in what enters the vectors, not in what may change between calls
        fitting = [name for name, one in SITUATIONS.items() if one.fits(case) and case in PIPELINES]
        for situation in ("same call", "same call", *fitting[1:]):
            assert torch.equal(run(pipe, case, situation=situation), plain(case, situation)), situation
            exact = handle.report().exact
            assert exact["rows served"] > 0 and "rows computed" not in exact, situation
        handle.restore()


@pytest.mark.parametrize("case", ["wan", "qwen_image"])
def test_few_steps_have_exact_tables_and_nothing_else(case: str):
    pipe, blocks = build(case), "blocks" if case == "wan" else "transformer_blocks"
    reuse = '[made_for]\nsteps = 9\n[choices]\nC = {method = "compute"}\nr = {method = "reuse"}\n'
    reuse += f'[timeline.both]\n"{blocks}.1-2" = "CrCrCrCrC"\n'
    handle = dit_accel.accelerate(pipe, tables(extra=reuse))
    with pytest.warns(UserWarning, match="changed nothing"):
        latents = run(pipe, case, steps=FEW_STEPS)
    assert torch.equal(latents, plain(case, steps=FEW_STEPS))
    assert handle.report().exact["rows served"] > 0 and not handle.report().did_something


@pytest.mark.parametrize("case", PIPELINES)
def test_rows_answer_and_the_projections_do_not(case: str):
    """Weights that turn to NaN in mid-run, in a way that no version tells, change nothing."""
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, tables())

    def spoil():
        for module in projections(pipe):
            for weight in module.parameters():
                weight.data.fill_(float("nan"))

    with during_step(pipe, 2, spoil):
        assert torch.equal(run(pipe, case), plain(case))
    if case != "wan22":  # its second denoiser starts later, with the weights of the first spoilt in that run
        handle.restore()
        assert not run(pipe, case).isfinite().all()


def test_a_schedule_is_entered_in_the_middle():
    """As image to image does; the rows before are made when a run asks for them."""
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, tables())

    def call(model, scheduler, step):
        torch.manual_seed(0)
        latents, text = torch.randn(1, 4, 3, 8, 10), torch.randn(1, 7, 16)
        with torch.no_grad():
            return model(latents, scheduler.timesteps[step].expand(1), text, return_dict=False)[0]

    def walk(pipe, first):
        pipe.scheduler.set_timesteps(STEPS)
        pipe.scheduler.set_begin_index(first)
        return [call(pipe.transformer, pipe.scheduler, step) for step in range(first, STEPS)]

    bare = build("wan")
    for first in (5, 0, 7):
        for ours, theirs in zip(walk(pipe, first), walk(bare, first), strict=True):
            assert torch.equal(ours, theirs)
        handle._installation.exact.finish(lambda: None)
    assert len(tables_of(handle).tables) == 1


def test_a_timestep_outside_the_schedule_is_computed_and_said(monkeypatch):
    pipe, plain_pipe = build("wan"), build("wan")
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 3, 8, 10), torch.randn(1, 7, 16)

    def call(model, time):
        with torch.no_grad():
            return model(latents, torch.tensor([time]), text, return_dict=False)[0]

    with weights_that_leave(monkeypatch):
        handle = dit_accel.accelerate(pipe, tables())
        pipe.scheduler.set_timesteps(STEPS)
        first = float(pipe.scheduler.timesteps[0])
        for time in (first, first - 0.25, first - 0.25):
            assert torch.equal(call(pipe.transformer, time), call(plain_pipe.transformer, time))
        report = handle.report()
        assert report.exact["rows computed"] == 2 and report.exact["rows served"] == 4
        assert any("outside the schedule" in note for note in report.notes)
        handle.restore()


@pytest.mark.parametrize("case", ["wan", "qwen_image", "pixart_sigma"])
def test_beside_a_gpu_no_step_is_read_and_a_foreign_timestep_makes_no_picture(case: str, monkeypatch):
    pipe = build(case)
    handle = dit_accel.accelerate(pipe, tables(text_kv=False))
    read = []
    monkeypatch.setattr(keys, "at_hand", lambda _: False)
    original = keys.bits
    monkeypatch.setattr(keys, "bits", lambda tensor: read.append(tensor) or original(tensor))
    run(pipe, case)
    read.clear()
    assert torch.equal(run(pipe, case), plain(case))
    # once per run: the first argument, and what each rule foresees for all steps
    assert len(read) <= 3
    forward = pipe.transformer.forward

    def moved(*args, timestep, **kwargs):
        return forward(*args, timestep=timestep + timestep.new_ones(()), **kwargs)

    with during_step(pipe, 4, lambda: pipe.transformer.__dict__.update(forward=moved)):
        latents = run(pipe, case)
    pipe.transformer.__dict__["forward"] = forward
    assert not latents.isfinite().any()
    assert any("not a number" in note for note in handle.report().notes)
    assert torch.equal(run(pipe, case), plain(case))
    assert "not used" in handle.report().exact["modulation"]


@pytest.mark.parametrize("case", WITH_ADAPTERS)
def test_adapters_on_projections_make_tables_anew(case: str, monkeypatch):
    pipe, bare = build(case), build(case)
    config = LoraConfig(r=2, target_modules=[WITH_ADAPTERS[case]], init_lora_weights=False)

    def add(each):
        torch.manual_seed(0)
        each.transformer.add_adapter(config, "one")

    changes = {
        "added": add,
        "scaled": lambda each: each.transformer.set_adapters("one", 0.5),
        "fused": lambda each: each.transformer.fuse_lora(),
        "unloaded": lambda each: each.transformer.unload_lora(),
    }
    handle = dit_accel.accelerate(pipe, tables())
    outputs = [run(pipe, case)]
    for name, change in changes.items():
        for each in (pipe, bare):
            change(each)
        outputs.append(run(pipe, case))
        assert torch.equal(outputs[-1], run(bare, case)), name
        assert handle.report().exact["rows served"] > 0, name
        assert name == "unloaded" or not torch.equal(outputs[-1], outputs[-2]), name
    assert not torch.equal(outputs[0], outputs[-1])  # unloaded, but fused: `weight.data` was written


def test_an_adapter_fused_and_unloaded_between_two_runs():
    """Identity, version and adapters are what they were; only the numbers tell."""
    pipe, bare = build("qwen_image"), build("qwen_image")
    dit_accel.accelerate(pipe, tables())
    before = run(pipe, "qwen_image")
    for each in (pipe, bare):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["img_mod.1"], init_lora_weights=False)
        each.transformer.add_adapter(config, "one")
        each.transformer.fuse_lora()
        each.transformer.unload_lora()
    after = run(pipe, "qwen_image")
    assert torch.equal(after, run(bare, "qwen_image")) and not torch.equal(after, before)


@pytest.mark.parametrize("case", ["cogvideox", "qwen_image"])
def test_an_adapter_rescaled_in_mid_run(case: str):
    results = []
    for recipe in (None, tables()):
        pipe = build(case)
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=[WITH_ADAPTERS[case]], init_lora_weights=False)
        pipe.transformer.add_adapter(config, "one")
        if recipe is not None:
            dit_accel.accelerate(pipe, recipe)
        with during_step(pipe, 3, lambda pipe=pipe: pipe.transformer.set_adapters("one", 0.25)):
            results.append(run(pipe, case))
    assert torch.equal(*results)


def test_an_exception_in_mid_run_and_the_undo_leave_no_trace(monkeypatch):
    pipe = build("qwen_image")
    before = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with weights_that_leave(monkeypatch):
        handle = dit_accel.accelerate(pipe, tables())
        with during_step(pipe, 3, stop), pytest.raises(Stop):
            run(pipe, "qwen_image")
        assert torch.equal(run(pipe, "qwen_image"), plain("qwen_image"))
        handle.restore()
    assert {name: set(vars(module)) for name, module in pipe.transformer.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())


def test_saves_as_the_plain_pipeline(tmp_path):
    pipe = build("cogvideox")
    pipe.transformer.save_pretrained(tmp_path / "plain")
    dit_accel.accelerate(pipe, tables())
    run(pipe, "cogvideox")
    pipe.transformer.save_pretrained(tmp_path / "ours")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_a_table_as_large_as_its_weights_is_not_made():
    pipe = build("pixart_sigma", layers=1)
    handle = dit_accel.accelerate(pipe, tables(text_kv=False))
    run(pipe, "pixart_sigma", steps=60)
    assert handle.report().exact["modulation"].startswith("not made")
    assert "rows served" not in handle.report().exact


def test_four_schedules_are_remembered(monkeypatch):
    pipe = build("qwen_image")
    handle = dit_accel.accelerate(pipe, tables())
    made = []
    original = ModulationTables._compute
    monkeypatch.setattr(
        ModulationTables, "_compute", lambda self, vectors: made.append(1) or original(self, vectors)
    )
    for steps in (1, 2, 3, 4, 5):
        run(pipe, "qwen_image", steps=steps)
    held = tables_of(handle).tables
    assert len(held) == modulation.SCHEDULES == 4
    assert handle.report().exact["table bytes"] == sum(
        size_of(row) for table in held.values() for row in table.rows.values()
    )
    made.clear()
    run(pipe, "qwen_image", steps=5)
    assert not made
    run(pipe, "qwen_image", steps=1)
    assert made


def test_another_vector_than_the_familys_is_never_answered(monkeypatch):
    """What a later version of the model does otherwise is found at the first forward."""
    pipe = build("cogvideox")
    original = type(pipe.transformer.time_embedding).forward
    handle = dit_accel.accelerate(pipe, tables())
    calls = []

    def forward(self, sample, condition=None):
        calls.append(1)
        out = original(self, sample, condition)
        return out if len(calls) <= STEPS + 1 else out * 1.0001  # as the tables are made, then otherwise

    expected = build("cogvideox")
    monkeypatch.setattr(
        type(pipe.transformer.time_embedding),
        "forward",
        lambda self, *args: original(self, *args) * 1.0001,
    )
    wanted = run(expected, "cogvideox")
    monkeypatch.setattr(type(pipe.transformer.time_embedding), "forward", forward)
    assert torch.equal(run(pipe, "cogvideox"), wanted)
    assert "another vector" in handle.report().exact["modulation"]


def test_gradients_are_never_lost():
    pipe = build("wan")
    handle = dit_accel.accelerate(pipe, tables())
    run(pipe, "wan")
    projection = pipe.transformer.condition_embedder.time_proj
    projection.weight.requires_grad_(True)
    pipe.scheduler.set_timesteps(STEPS)
    time = pipe.scheduler.timesteps[:1]
    out = pipe.transformer(torch.randn(1, 4, 3, 8, 10), time, torch.randn(1, 7, 16), return_dict=False)[0]
    out.sum().backward()
    assert projection.weight.grad is not None and projection.weight.grad.abs().max() > 0
    assert "gradients" in handle.report().exact["modulation"]


def test_what_stands_in_the_way_is_said_and_nothing_else_happens():
    pipe = build("wan")
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    handle = dit_accel.accelerate(pipe, tables("auto", "auto", '[choices]\nw = {method = "reuse"}\n'))
    assert hindrance.of_model(pipe, "transformer", pipe.transformer, False) is not None
    strict = dit_accel.accelerate(pipe, tables(), strict=True, replace=True)
    with pytest.raises(dit_accel.errors.DenseFallback, match="compiled"):
        run(pipe, "wan")
    strict.restore()
    assert handle.report().exact == {}
    torch._dynamo.reset()


def test_auto_leaves_neutral_recipes_and_tiny_weights_alone():
    for recipe, reason in (("neutral", None), (tables("auto", "auto"), None)):
        pipe = build("qwen_image")
        handle = dit_accel.accelerate(pipe, recipe)
        assert torch.equal(run(pipe, "qwen_image"), plain("qwen_image"))
        assert handle.report().exact.get("modulation") == reason
    window = '[choices]\nw = {method = "window", radius = [0, 1, 1]}\n[attention.both]\n"*" = ["w"]\n'
    handle = dit_accel.accelerate(pipe, tables("auto", "auto", window), replace=True)
    run(pipe, "qwen_image")
    assert handle.report().exact["modulation"].startswith("not made")


def test_a_third_of_qwen_image_is_modulation():
    """The number of docs/DESIGN.md, from the modules of the released size."""
    with torch.device("meta"):
        denoiser = QwenImageTransformer2DModel(out_channels=16).to(torch.bfloat16)
    names = family_of(denoiser).modulation.projections
    modules = [child.module for name in names for child in weights.children(denoiser, name)]
    freed = weights.nbytes(modules)
    row = sum(module.weight.shape[0] for module in modules) * 2
    total = sum(weight.numel() for weight in denoiser.parameters()) * 2
    assert (len(modules), freed, row) == (121, 13_631_729_664, 4_435_968)
    assert 0.333 < freed / total < 0.334
    assert freed - 50 * row == 13_409_931_264  # saved at 50 steps
