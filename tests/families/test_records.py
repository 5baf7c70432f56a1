"""What each family record says of diffusers' models, held against the models themselves."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import pytest
import torch
from torch import Tensor

from dit_accel.families import family_of
from dit_accel.testing import TINY


@dataclass
class Seen:
    """What one run showed: forward arguments of denoisers and blocks by name, and self-attention lengths."""

    denoiser: list = field(default_factory=list)  # (module, arguments)
    blocks: list = field(default_factory=list)  # (module, arguments, output)
    lengths: list = field(default_factory=list)  # query tokens at the attention call of a self-attention


def bound(module, args, kwargs):
    """Forward arguments by name; tensors are copied, for a caller may change them in place."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


@contextmanager
def watch(pipe, monkeypatch):
    """Record a run from outside: module hooks, and SDPA, where the dense attention of all families ends."""
    seen, inside, hooks = Seen(), [], []
    plain = torch.nn.functional.scaled_dot_product_attention

    def sdpa(query, *args, **kwargs):
        if inside:
            seen.lengths.append(query.shape[-2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)

    def on_denoiser(module, args, kwargs):
        seen.denoiser.append((module, bound(module, args, kwargs)))

    def on_block(module, args, kwargs, output):
        seen.blocks.append((module, bound(module, args, kwargs), output))

    for denoiser in denoisers_of(pipe):
        family = family_of(denoiser)
        hooks.append(denoiser.register_forward_pre_hook(on_denoiser, with_kwargs=True))
        for block in blocks_of(denoiser):
            hooks.append(block.register_forward_hook(on_block, with_kwargs=True))
            for name in family.self_attention:
                attention = block.get_submodule(name)
                hooks.append(attention.register_forward_pre_hook(lambda *_: inside.append(1)))
                hooks.append(attention.register_forward_hook(lambda *_: inside.clear()))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def denoisers_of(pipe):
    names = family_of(pipe.transformer).denoisers
    return [denoiser for name in names if (denoiser := getattr(pipe, name, None)) is not None]


def blocks_of(denoiser):
    return [block for name in family_of(denoiser).blocks for block in denoiser.get_submodule(name)]


@contextmanager
def replaced_outputs(block, outputs):
    """Let children of a block return what `outputs` says instead of computing."""
    try:
        for name, output in outputs.items():
            block.get_submodule(name).forward = lambda *args, _output=output, **kwargs: _output
        yield
    finally:
        for name in outputs:
            del block.get_submodule(name).forward


def tensors_in(value):
    """All tensors of a nested argument."""
    if isinstance(value, Tensor):
        return [value]
    return (
        [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, tuple | list) else []
    )


def zeros_like(output):
    return torch.zeros_like(output) if isinstance(output, Tensor) else tuple(map(torch.zeros_like, output))


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.fixture(params=TINY)
def case(request):
    """Every tiny pipeline in turn."""
    return TINY[request.param]


@pytest.fixture
def pipe(case):
    return case.build()


def a_block_call(case, pipe, monkeypatch):
    """The second block of a run: its arguments, its output and the outputs of its sublayers."""
    block = blocks_of(pipe.transformer)[1]
    sublayers, hooks = {}, []
    for name in family_of(pipe.transformer).sublayers:

        def keep_first(module, args, output, name=name):
            sublayers.setdefault(name, output)

        hooks.append(block.get_submodule(name).register_forward_hook(keep_first))
    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2)
    for hook in hooks:
        hook.remove()
    arguments, output = next((given, out) for module, given, out in seen.blocks if module is block)
    return block, arguments, as_tuple(output), sublayers


def test_record_is_found_and_named_as_the_case_says(case, pipe):
    assert family_of(pipe.transformer).name == case.family


def test_names_exist_in_every_block(pipe):
    family = family_of(pipe.transformer)
    for denoiser in denoisers_of(pipe):
        for block in blocks_of(denoiser):
            for name in family.sublayers:
                block.get_submodule(name)
            assert set(family.streams + family.unbatched) <= set(inspect.signature(block.forward).parameters)


@pytest.mark.parametrize(
    "height,width,num_frames", [(None, None, None), (128, 48, 13)], ids=["usual", "other"]
)
def test_grid_text_and_references_are_what_attention_sees(case, pipe, monkeypatch, height, width, num_frames):
    family = family_of(pipe.transformer)
    if height and case.name == "qwen_image_edit":
        height, width = 384, 256  # its VAE has a factor of 64
    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2, height=height, width=width, num_frames=num_frames)

    lengths = iter(seen.lengths)
    for denoiser, inputs in seen.denoiser:
        text = inputs["encoder_hidden_states"].shape[1] if "text" in family.token_order else 0
        tokens = (
            prod(family.grid(denoiser.config, inputs)) + family.references(denoiser.config, inputs) + text
        )
        assert [next(lengths) for _ in blocks_of(denoiser)] == [tokens] * len(blocks_of(denoiser))
    assert next(lengths, None) is None


def test_grid_keeps_frames_rows_and_columns_apart(case, pipe, monkeypatch):
    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2)
    frames = {"cogvideox_15": 2}.get(case.name, 3 if case.size[2] > 1 else 1)

    denoiser, inputs = seen.denoiser[0]
    assert family_of(denoiser).grid(denoiser.config, inputs) == (frames, 4, 5)


def test_frame_axis_holds_the_latent_frames(case, pipe, monkeypatch):
    family = family_of(pipe.transformer)
    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2)
    latents = seen.denoiser[0][1]["hidden_states"]

    assert (family.frame_axis is None) == (family.output == "image")
    if family.frame_axis is not None:
        assert latents.shape[family.frame_axis] == (4 if case.name == "cogvideox_15" else 3)


def test_sublayers_are_all_that_is_added_and_streams_return_in_order(case, pipe, monkeypatch):
    block, arguments, _, sublayers = a_block_call(case, pipe, monkeypatch)
    family = family_of(pipe.transformer)

    with torch.no_grad(), replaced_outputs(block, {name: zeros_like(out) for name, out in sublayers.items()}):
        returned = as_tuple(block(**arguments))

    assert len(returned) == len(family.returns)
    for name, stream in zip(family.returns, returned, strict=True):
        assert torch.equal(stream, arguments[name])


def test_stored_sublayer_outputs_replay_the_block_bit_for_bit(case, pipe, monkeypatch):
    block, arguments, output, sublayers = a_block_call(case, pipe, monkeypatch)

    with torch.no_grad(), replaced_outputs(block, sublayers):
        replayed = as_tuple(block(**arguments))

    assert all(map(torch.equal, replayed, output))


def test_each_sublayer_changes_the_output_of_its_block(case, pipe, monkeypatch):
    block, arguments, output, sublayers = a_block_call(case, pipe, monkeypatch)

    for name, out in sublayers.items():
        with torch.no_grad(), replaced_outputs(block, {name: zeros_like(out)}):
            without = as_tuple(block(**arguments))
        assert not all(map(torch.equal, without, output)), name


def test_sublayers_run_in_the_order_of_the_record(case, pipe):
    order = []
    family = family_of(pipe.transformer)
    for name in family.sublayers:
        first = blocks_of(pipe.transformer)[0].get_submodule(name)
        first.register_forward_hook(lambda *_, n=name: order.append(n))

    case.call(pipe, steps=2, guidance=1.0)

    assert tuple(order[: len(family.sublayers)]) == family.sublayers


def test_unbatched_block_arguments_are_those_that_a_batch_does_not_change(case, pipe, monkeypatch):
    sizes = []
    for batch in (1, 3):
        with watch(pipe, monkeypatch) as seen:
            case.call(pipe, steps=2, batch=batch)
        _, arguments, _ = seen.blocks[0]
        sizes.append({n: [t.shape[0] for t in tensors_in(v)] for n, v in arguments.items() if tensors_in(v)})

    fixed = {name for name in sizes[0] if sizes[0][name] == sizes[1][name]}
    assert fixed == {name for name in family_of(pipe.transformer).unbatched if name in sizes[0]}


def test_branches_come_in_the_order_of_the_guidance_style(case, pipe, monkeypatch):
    family = family_of(pipe.transformer)
    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2, batch=2)
    cond, uncond = (case.text(2, 0, branch) for branch in (0, 1))
    given = [inputs["encoder_hidden_states"] for _, inputs in seen.denoiser]

    expected = [torch.cat([uncond, cond])] if family.guidance == "batched" else [cond, uncond]
    assert list(map(torch.equal, given, 2 * expected)) == [True] * len(given)
    assert len(given) == 2 * len(expected)


def test_guidance_argument_is_one_of_the_pipeline_and_turns_guidance_off(case, pipe, monkeypatch):
    family = family_of(pipe.transformer)
    assert family.guidance_argument == case.guidance_argument
    assert family.guidance_argument in inspect.signature(type(pipe).__call__).parameters

    with watch(pipe, monkeypatch) as seen:
        case.call(pipe, steps=2, guidance=1.0)

    assert [inputs["hidden_states"].shape[0] for _, inputs in seen.denoiser] == [1, 1]


def test_positions_name_a_submodule_or_a_forward_argument(case, pipe):
    family = family_of(pipe.transformer)
    modules = dict(pipe.transformer.named_modules())
    arguments = inspect.signature(type(pipe.transformer).forward).parameters

    assert (family.positions in modules) != (family.positions in arguments)


def test_output_is_a_video_where_the_pipeline_counts_frames(pipe):
    family = family_of(pipe.transformer)
    assert (family.output == "video") == ("num_frames" in inspect.signature(type(pipe).__call__).parameters)


def test_both_denoisers_of_wan22_run():
    pipe, ran = TINY["wan22"].build(), []
    for denoiser in denoisers_of(pipe):
        denoiser.register_forward_pre_hook(lambda module, _: ran.append(module))

    TINY["wan22"].call(pipe, steps=4)

    assert ran[0] is pipe.transformer
    assert ran[-1] is pipe.transformer_2
