"""Accuracy by budget: a kernel may lose no more than twice what plain PyTorch loses in the same dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate_as(actual: Tensor, reference: Tensor, oracle: Tensor, *, factor: float = 2.0) -> None:
    """Fail unless `actual` is as near to the oracle as `factor` times the reference, plus one rounding unit.

    All three have one shape; `reference` is plain PyTorch in the dtype of `actual`, `oracle` is float64. The
    error is the largest absolute one. Infinities (the LSE of an empty row) must stand at the same places.
    """
    if actual.shape != oracle.shape or reference.shape != oracle.shape:
        raise AssertionError(
            f"shapes differ: actual {list(actual.shape)}, reference {list(reference.shape)}, "
            f"oracle {list(oracle.shape)}"
        )
    finite = torch.isfinite(oracle)
    for name, tensor in (("actual", actual), ("reference", reference)):
        if not torch.equal(tensor.double()[~finite], oracle.double()[~finite]):
            raise AssertionError(f"{name} differs from the oracle where the oracle is not finite")
        if not torch.isfinite(tensor[finite]).all():
            raise AssertionError(f"{name} is not finite where the oracle is")
    if not finite.any():
        return
    exact = oracle.double()[finite]
    error = (actual.double()[finite] - exact).abs().max().item()
    reference_error = (reference.double()[finite] - exact).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = factor * reference_error + rounding
    if error > budget:
        raise AssertionError(
            f"error {error:.3e} is over the budget {budget:.3e} = {factor} x reference error "
            f"{reference_error:.3e} + one rounding unit {rounding:.3e} ({actual.dtype})"
        )


def far_from_zero(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers around 1: sums over padding or masked tokens show, where a mean of 0 would hide them."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: the largest), so that nothing unwritten looks like 0."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    # the filling is a part of deterministic mode; warn_only keeps operations without such a mode usable
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
