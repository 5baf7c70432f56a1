"""Rows in float8: the bound of their error, rows that have no largest number, and large tensors in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.testing import far_from_zero
from dit_accel_kernels.history_mix import fp8, quantize_rows_fp8


def error_in_budget(x, values, scales):
    error = (values.float() * scales - x.float()).abs()
    breath = 1 + 2**-20  # of the two float32 operations around the rounding
    normal = x.float().abs() >= 2**-6 * scales
    budget = torch.where(normal, 2**-4 * x.float().abs(), 2**-10 * scales)
    return bool((error <= budget * breath).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (17, 1), (2, 17, 7), (2, 3, 5, 257)], ids=str)
def test_the_error_is_within_half_a_unit(dtype, shape):
    x = far_from_zero(*shape, dtype=dtype)
    x[..., ::3] *= 1e-3
    values, scales = quantize_rows_fp8(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (*shape[:-1], 1)
    assert error_in_budget(x, values, scales)
    assert (values.float().abs().amax(-1) == 448).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=9))
def test_the_bound_holds_for_any_row(numbers):
    x = torch.tensor(numbers)
    x = torch.where(x.abs() < 1e-30, 0, x)  # the scale of less is not normal in float32
    assert error_in_budget(x, *quantize_rows_fp8(x))


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite():
    values, scales = quantize_rows_fp8(torch.tensor([[0.0, 0.0], [1e-45, 0.0], [3e-38, -1e-38]]))
    assert values.float().isfinite().all() and (scales > 0).all()
    assert (values[0].float() == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_nan_or_infinity_reads_back_as_nan_and_others_do_not(bad):
    values, scales = quantize_rows_fp8(torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]]))
    back = values.float() * scales
    assert back[0].isnan().all() and back[1].isfinite().all()


def test_parts_of_a_large_tensor_and_strides_change_nothing(monkeypatch):
    x = far_from_zero(3, 10, 14)[:, ::2, 1::2]
    whole = quantize_rows_fp8(x)
    monkeypatch.setattr(fp8, "AT_ONCE", 20)
    parts = quantize_rows_fp8(x)
    assert torch.equal(whole[0].view(torch.uint8), parts[0].view(torch.uint8)) and torch.equal(
        whole[1], parts[1]
    )


@pytest.mark.parametrize("x", [torch.ones(3, dtype=torch.int32), torch.ones(())], ids=["integers", "no axis"])
def test_what_has_no_rows_of_floats_is_refused(x):
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        quantize_rows_fp8(x)
    assert quantize_rows_fp8(torch.ones(0, 3))[1].shape == (0, 1)
