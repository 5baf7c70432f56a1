"""Finding a record, refusing a wrong one, and the token counts of Qwen-Image's special models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel

from dit_accel.families import family_of
from dit_accel.families.qwen_image import QWEN_IMAGE
from dit_accel.families.wan import WAN


def test_an_unknown_model_has_no_family():
    assert family_of(torch.nn.Linear(2, 2)) is None


def test_a_subclass_and_a_compiled_model_keep_their_family():
    class Mine(WanTransformer3DModel):
        def __init__(self):
            torch.nn.Module.__init__(self)

    assert family_of(Mine()) is WAN
    assert family_of(torch.compile(Mine())) is WAN


def test_a_record_must_return_its_streams():
    with pytest.raises(ValueError, match=r"family wan: returns .* must name each of the streams"):
        replace(WAN, returns=("encoder_hidden_states",))


def test_a_record_must_list_its_attention_among_its_sublayers():
    with pytest.raises(ValueError, match=r"family wan: \['attn2'\] are attention names but not sublayers"):
        replace(WAN, sublayers=("attn1", "ffn"))


@pytest.mark.parametrize(
    "shapes,layered,grid,references",
    [
        ([(1, 4, 5)], False, (1, 4, 5), 0),
        ([[(1, 4, 5)]] * 2, False, (1, 4, 5), 0),
        ([[(1, 4, 5), (1, 2, 3), (1, 3, 3)]], False, (1, 4, 5), 15),
        ([[(1, 4, 5), (1, 4, 5), (1, 4, 5), (1, 2, 3)]], True, (3, 4, 5), 6),
    ],
    ids=["flat", "text_to_image", "edit_two_references", "layered"],
)
def test_qwen_image_counts_its_target_and_its_references(shapes, layered, grid, references):
    config, inputs = SimpleNamespace(use_layer3d_rope=layered), {"img_shapes": shapes}

    assert QWEN_IMAGE.grid(config, inputs) == grid
    assert QWEN_IMAGE.references(config, inputs) == references


def test_layered_qwen_image_takes_the_tokens_that_the_record_counts():
    model = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        use_layer3d_rope=True,
    )
    inputs = {"img_shapes": [[(1, 4, 5)] * 3 + [(1, 2, 3)]]}
    frames, rows, columns = QWEN_IMAGE.grid(model.config, inputs)
    tokens = frames * rows * columns + QWEN_IMAGE.references(model.config, inputs)

    out = model(
        hidden_states=torch.randn(1, tokens, 8),
        encoder_hidden_states=torch.randn(1, 7, 16),
        timestep=torch.ones(1),
        **inputs,
    ).sample

    assert out.shape[1] == tokens == 66
