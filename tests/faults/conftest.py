"""A run collects garbage before its first step; torch and timm need not be looked through each time."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def libraries_are_not_collected() -> Iterator[None]:
    """At its end a run unfreezes all garbage, which would undo this; so what runs leave in cycles stays until here, below 2 GB."""
    unfreeze = gc.unfreeze
    gc.unfreeze = lambda: None
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze = unfreeze
    gc.unfreeze()
    gc.collect()
