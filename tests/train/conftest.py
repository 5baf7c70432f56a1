"""Trainings here may differ in precision; accelerate allows one precision for a process at a time."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _forget_precision():
    yield
    AcceleratorState._reset_state()
