"""Pixels for tests, as functions that a worker process can import."""

import os
import time
from pathlib import Path

import numpy as np

COUNTER = np.random.default_rng(0)


def of_index(epoch, index):
    """A small image that depends on (epoch, index) alone."""
    return np.random.default_rng([epoch, index]).integers(0, 255, (16, 16, 3), dtype=np.uint8)


def of_arrival(epoch, index):
    """The negative control: numbers in the order in which a worker happens to be asked."""
    time.sleep(1e-3 * (index % 3))
    return COUNTER.integers(0, 255, (16, 16, 3), dtype=np.uint8)


def slow(epoch, index):
    time.sleep(0.02)
    return of_index(epoch, index)


def deadly(epoch, index):
    """Image 5 ends any process that makes it."""
    if index == 5:
        os._exit(11)
    return of_index(epoch, index)


def prints(epoch, index):
    print("a library that talks")
    return of_index(epoch, index)


def fails(epoch, index):
    if index == 7:
        raise OSError("gone")
    return of_index(epoch, index)


def modules(epoch, index):
    """Writes down whether this process has torch; the file is named by an environment variable."""
    import sys

    Path(os.environ["LOWMEM_TEST_OUT"]).write_text(
        " ".join(name for name in ("torch", "pydantic") if name in sys.modules)
    )
    return of_index(epoch, index)


def sleeper(epoch, index):
    time.sleep(1.5)
    return of_index(epoch, index)


class Large:
    """A source with a large array, as a file index is."""

    def __init__(self, array):
        self.array = array

    def __call__(self, epoch, index):
        assert self.array[index] == 0
        return of_index(epoch, index)
