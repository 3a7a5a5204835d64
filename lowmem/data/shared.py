"""Memory that worker processes fill and the training process reads.

On Linux an anonymous file (memfd), which no kill can leave behind and which the size of /dev/shm does not limit; elsewhere named
shared memory. A block is known to the other side by its key.
"""

import mmap
import os
import sys
from multiprocessing import shared_memory
from typing import Protocol

PAGE_BYTES = max(mmap.PAGESIZE, mmap.ALLOCATIONGRANULARITY)
Key = int | str
"""The place of a block in the anonymous file, or the name of shared memory."""


class Memory(Protocol):
    """The training process's side."""

    def block(self, num_bytes: int) -> tuple[Key, memoryview]:
        """A new block, zeroed."""

    def inherited(self) -> tuple[int, ...]:
        """File descriptors that a worker must inherit."""

    def close(self) -> None: ...


class AnonymousMemory:
    """Blocks one behind the other in a file without a name; they live until the file is closed on both sides."""

    def __init__(self) -> None:
        self.file = os.memfd_create("lowmem-loader")
        self.num_bytes = 0

    def block(self, num_bytes: int) -> tuple[Key, memoryview]:
        key, size = self.num_bytes, _whole_pages(num_bytes)
        os.ftruncate(self.file, key + size)
        self.num_bytes += size
        return key, memoryview(mmap.mmap(self.file, size, offset=key))[:num_bytes]

    def inherited(self) -> tuple[int, ...]:
        return (self.file,)

    def close(self) -> None:
        os.close(self.file)


class NamedMemory:
    """One piece of named shared memory for each block."""

    def __init__(self) -> None:
        self.blocks: list[shared_memory.SharedMemory] = []

    def block(self, num_bytes: int) -> tuple[Key, memoryview]:
        made = shared_memory.SharedMemory(create=True, size=_whole_pages(num_bytes))
        self.blocks.append(made)
        return made.name, made.buf[:num_bytes]

    def inherited(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        """All views of the blocks must be gone."""
        for made in self.blocks:
            made.close()
            made.unlink()


def new_memory() -> Memory:
    """The kind that suits the system."""
    return AnonymousMemory() if hasattr(os, "memfd_create") else NamedMemory()


class Attached:
    """A worker's side: blocks by their keys, each mapped once. `file` is the inherited anonymous file, if there is one."""

    def __init__(self, file: int | None) -> None:
        self.file = file
        self.known: dict[Key, memoryview] = {}
        self.named: list[shared_memory.SharedMemory] = []

    def block(self, key: Key, num_bytes: int) -> memoryview:
        if key not in self.known:
            self.known[key] = self._map(key, num_bytes)
        return self.known[key][:num_bytes]

    def _map(self, key: Key, num_bytes: int) -> memoryview:
        if isinstance(key, int):
            assert self.file is not None
            return memoryview(mmap.mmap(self.file, _whole_pages(num_bytes), offset=key))
        self.named.append(_attach(key))
        return self.named[-1].buf


def _attach(name: str) -> shared_memory.SharedMemory:
    """Attach without becoming an owner: up to Python 3.12 the resource tracker would remove the memory when the worker ends."""
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name, track=False)
    if sys.platform != "win32":
        from multiprocessing import resource_tracker

        resource_tracker.register = lambda *_: None
    return shared_memory.SharedMemory(name)


def _whole_pages(num_bytes: int) -> int:
    return max(1, -(-num_bytes // PAGE_BYTES)) * PAGE_BYTES
