"""What every test leaves as it found it, and what tests of a card need."""

import os
from collections.abc import Iterator

import pytest
import torch

from lowmem.machine import usable_cores

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)]
"""For tests that run everywhere and are meant for a card: on the CPU they show that the test itself is right."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many test processes as there are cores, up to four; those that share a card run one after the other."""
    return 0 if config.option.markexpr.strip() == "cuda" else min(4, usable_cores())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA card here"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither the user's cache decides a test, nor a test what is in it; child processes inherit the place."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            patch.setenv(name, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """One thread of torch, so that tests beside one another do not wait for each other's; a run may set another number, on which the
    last bits of sums on a CPU depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that give the same bits each time, where torch has them."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn


@pytest.fixture
def whole_card() -> Iterator[None]:
    """The allocator's limit and its cache are those of a fresh process before and after."""
    _release()
    yield
    _release()


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.reset_peak_memory_stats()
