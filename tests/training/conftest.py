"""The tests of training that run several trainings in this process."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def alone() -> Iterator[None]:
    """A test as in a process of its own: accelerate keeps its state for all tests of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
