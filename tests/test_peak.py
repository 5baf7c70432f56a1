"""Peak memory is that of the work inside, not of what ran before it."""

import pytest
import torch

from dit_accel.peak import peak_memory

MEGABYTE = 2**20


def used(megabytes: int, device: str = "cpu") -> int:
    with peak_memory() as peak:
        torch.ones(megabytes * MEGABYTE, dtype=torch.uint8, device=device)
    assert peak.bytes_ is not None
    assert peak.growth is not None
    assert peak.bytes_ >= peak.growth
    return peak.growth // MEGABYTE


def test_growth_is_what_was_allocated_and_a_larger_run_before_does_not_show():
    large, small = used(300), used(100)
    assert 290 <= large <= 330
    assert 90 <= small <= 130


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked():
    assert 300 <= used(300, "cuda") <= 310
    with peak_memory() as peak:
        pass
    assert "CUDA" in peak.measured


def test_a_system_without_a_high_water_mark_gives_none(monkeypatch, tmp_path):
    from dit_accel import peak as module

    monkeypatch.setattr(module, "CLEAR", tmp_path / "no" / "such")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with peak_memory() as peak:
        pass
    assert (peak.bytes_, peak.growth) == (None, None)
