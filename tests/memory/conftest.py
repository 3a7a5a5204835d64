"""Small models have small activations: nothing would be offloaded at the usual threshold."""

import pytest


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.memory.activations.MIN_OFFLOAD_BYTES", 1024)
