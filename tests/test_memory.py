"""Owned buffers: copies, reuse, ages by head, and bytes."""

import torch

from dit_accel.memory import Memory

HERE = ("transformer", "blocks.0.attn1", "cond", ((3, 4, 5), 0))
THERE = ("transformer", "blocks.0.attn1", "uncond", ((3, 4, 5), 0))


def test_a_stored_value_is_a_copy():
    memory = Memory()
    value = torch.arange(6.0)
    memory.store(HERE, "out", [value], step=3)
    value.fill_(0)
    slot = memory.recall(HERE, "out")
    assert slot is not None and slot.made_at == {0: 3}
    assert torch.equal(slot.tensors[0], torch.arange(6.0))


def test_nothing_is_there_under_another_branch_name_or_layout():
    memory = Memory()
    memory.store(HERE, "out", [torch.ones(2)], step=0)
    assert memory.recall(THERE, "out") is None
    assert memory.recall(HERE, "shared") is None
    assert memory.recall((*HERE[:3], ((3, 4, 6), 0)), "out") is None
    assert memory.recall(("transformer_2", *HERE[1:]), "out") is None


def test_a_buffer_is_used_again_while_shape_and_dtype_stay():
    memory = Memory()
    memory.store(HERE, "out", [torch.ones(4)], step=0)
    buffer = memory.recall(HERE, "out").tensors[0]
    memory.store(HERE, "out", [torch.zeros(4)], step=1)
    assert memory.recall(HERE, "out").tensors[0] is buffer
    assert memory.recall(HERE, "out").made_at == {0: 1}
    memory.store(HERE, "out", [torch.zeros(5)], step=2)
    assert memory.recall(HERE, "out").tensors[0].shape == (5,)
    memory.store(HERE, "out", [torch.zeros(5, dtype=torch.bfloat16)], step=3)
    assert memory.recall(HERE, "out").tensors[0].dtype is torch.bfloat16


def test_bytes_and_peak():
    memory = Memory()
    memory.store(HERE, "out", [torch.ones(10)], step=0)
    memory.store(THERE, "out", [torch.ones(10, dtype=torch.bfloat16), torch.ones(5)], step=0)
    assert memory.peak_bytes == 40 + 20 + 20
    memory.store(HERE, "out", [torch.ones(10)], step=1)  # the same buffer
    assert memory.peak_bytes == 80
    memory.store(HERE, "out", [torch.ones(2)], step=2)  # a smaller one: the peak stays
    assert memory.peak_bytes == 80
    memory.store(THERE, "shared", [torch.ones(10)], step=2)
    assert memory.peak_bytes == 8 + 40 + 40


def test_release_remembers_the_peak_and_clear_forgets_it():
    memory = Memory()
    memory.store(HERE, "out", [torch.ones(10)], step=0)
    memory.release()
    assert memory.recall(HERE, "out") is None and memory.peak_bytes == 40
    memory.store(HERE, "out", [torch.ones(3)], step=0)
    assert memory.peak_bytes == 40
    memory.clear()
    assert memory.recall(HERE, "out") is None and memory.peak_bytes == 0
    memory.store(HERE, "out", [torch.ones(3)], step=0)
    assert memory.peak_bytes == 12


def test_heads_are_stored_at_their_places_with_their_ages():
    memory = Memory()
    value = torch.randn(2, 3, 4, 5)  # [B, N, H, D]
    memory.store_heads(HERE, "out", value, heads=[3], of=[1, 3], step=0)
    memory.store_heads(HERE, "out", value + 1, heads=[1], of=[1, 3], step=2)
    slot = memory.recall(HERE, "out")
    assert slot.tensors[0].shape == (2, 3, 2, 5)
    assert torch.equal(slot.tensors[0][:, :, 1], value[:, :, 3])
    assert torch.equal(slot.tensors[0][:, :, 0], value[:, :, 1] + 1)
    assert slot.made_at == {3: 0, 1: 2}
    assert memory.peak_bytes == 2 * 3 * 2 * 5 * 4


def test_an_empty_value_marks_a_complete_recording():
    memory = Memory()
    memory.store(HERE, "out", (), step=4)
    assert memory.recall(HERE, "out").made_at == {0: 4} and memory.peak_bytes == 0


def test_the_graph_of_an_activation_is_not_kept():
    memory = Memory()
    value = torch.ones(2, requires_grad=True) * 2
    memory.store(HERE, "out", [value], step=0)
    assert not memory.recall(HERE, "out").tensors[0].requires_grad


def test_a_ring_holds_the_last_values_and_takes_the_oldest_place():
    memory = Memory()
    for step in (0, 2, 3, 7):
        memory.store(HERE, "out", [torch.full((2, 3), float(step))], step, depth=3)
    assert [slot.step for slot in memory.history(HERE, "out")] == [7, 3, 2]
    assert [slot.tensors[0][0, 0].item() for slot in memory.history(HERE, "out")] == [7, 3, 2]
    memory.store(
        HERE, "out", [torch.full((2, 3), -1.0)], 3, depth=3
    )  # a step that runs again keeps its place
    assert [slot.tensors[0][0, 0].item() for slot in memory.history(HERE, "out")] == [7, -1, 2]
    assert memory.peak_bytes == 3 * 24


def test_in_8_bits_rows_keep_their_scale_and_a_quarter_of_the_bytes():
    memory = Memory(storage="fp8")
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [50], [0]]
    )
    memory.store(HERE, "out", [rows + torch.tensor([[0], [9], [0], [0]])], step=1)
    (slot,) = memory.history(HERE, "out")
    back = slot.tensors[0].float() * slot.scales[0]
    wanted = rows + torch.tensor([[0], [9], [0], [0]])
    assert slot.tensors[0].dtype is torch.float8_e4m3fn
    assert ((back - wanted).abs() <= wanted.abs().amax(1, keepdim=True) / 16).all()
    assert memory.peak_bytes == 4 * 64 + 4 * 4


def test_a_ring_in_8_bits_fills_its_buffers_anew():
    memory = Memory(storage="fp8")
    memory.store(HERE, "out", [torch.ones(2, 4)], step=0)
    slot = memory.recall(HERE, "out")
    memory.store(HERE, "out", [torch.full((2, 4), 3.0)], step=1)
    assert memory.recall(HERE, "out") is slot
    assert torch.allclose(slot.tensors[0].float() * slot.scales[0], torch.full((2, 4), 3.0))


def test_what_must_come_back_exactly_is_never_coded():
    memory = Memory(storage="fp8")
    value = torch.linspace(8, 9, 12).view(3, 4)
    memory.store(HERE, "k", [value], step=0, exact=True)
    assert torch.equal(memory.recall(HERE, "k").tensors[0], value)
