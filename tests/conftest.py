"""What every test leaves as it found it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """A run sets the number of torch's threads, on which the last bits of sums on a CPU depend."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
