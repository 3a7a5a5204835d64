"""A run collects garbage before its first step; torch and timm need not be looked through each time."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import make_photos


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


@pytest.fixture(scope="package")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos") / "photos")
