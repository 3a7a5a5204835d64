"""Small models have small activations: nothing would be offloaded at the usual threshold."""

import gc
from collections.abc import Iterator

import pytest
from memory_helpers import keepable


@pytest.fixture(autouse=True)
def offload_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.memory.offload.MIN_OFFLOAD_BYTES", 1024)


@pytest.fixture(autouse=True, scope="session")
def libraries_are_not_collected() -> Iterator[None]:
    """An Engine collects garbage when it is closed; torch and timm need not be looked through each time."""
    keepable("test_resnet")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
