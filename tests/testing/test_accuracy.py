"""The accuracy budget itself: what passes, what does not, and what it says."""

import pytest
import torch

from dit_accel.testing import assert_as_accurate_as, far_from_zero, poisoned_memory

ORACLE = torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64)
REFERENCE = (ORACLE + torch.tensor([0.0, 0.01, 0.0])).float()


def test_twice_the_error_of_the_reference_passes():
    assert_as_accurate_as((ORACLE + 0.02).float(), REFERENCE, ORACLE)


def test_more_than_twice_the_error_fails_with_both_numbers():
    with pytest.raises(AssertionError, match=r"error 2\.1.*e-02 is over the budget 2\.0.*e-02"):
        assert_as_accurate_as((ORACLE + 0.021).float(), REFERENCE, ORACLE)


def test_one_rounding_unit_is_free_where_the_reference_is_exact():
    exact = ORACLE.float()
    assert_as_accurate_as(exact + 3e-7, exact, ORACLE)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_as_accurate_as(exact + 1e-6, exact, ORACLE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_fails(value):
    actual = ORACLE.float().clone()
    actual[1] = value
    with pytest.raises(AssertionError, match="actual is not finite"):
        assert_as_accurate_as(actual, REFERENCE, ORACLE)


def test_infinities_must_stand_where_the_oracle_has_them():
    oracle = ORACLE.clone()
    oracle[0] = float("-inf")
    assert_as_accurate_as(oracle.float(), oracle.float(), oracle)
    with pytest.raises(AssertionError, match="actual differs from the oracle where"):
        assert_as_accurate_as(REFERENCE, oracle.float(), oracle)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match=r"actual \[1, 3\]"):
        assert_as_accurate_as(REFERENCE[None], REFERENCE, ORACLE)


def test_data_is_around_one_and_repeatable():
    data = far_from_zero(1000, dtype=torch.bfloat16, seed=3)
    assert data.dtype == torch.bfloat16
    assert 0.8 < data.float().mean() < 1.2
    assert torch.equal(data, far_from_zero(1000, dtype=torch.bfloat16, seed=3))


def test_poisoned_memory_is_not_a_number_and_leaves_no_trace():
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert torch.empty(5).isnan().all()
        assert torch.empty_like(torch.ones(5)).isnan().all()
        assert (torch.ones(2).new_empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.are_deterministic_algorithms_enabled() == before
