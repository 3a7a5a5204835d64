"""The one object by which a run writes what it must not lose: every call of it may fail, be cut off by a kill, or be undone by a
power loss, and tests put a disk behind it that does so.

A file's bytes are durable after `sync` of its handle, a name (made, renamed, removed) after `sync_folder` of the folder that holds
it. Windows cannot flush a folder and keeps names durable by its journal, so `sync_folder` does nothing there.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from lowmem.errors import LowmemError
from lowmem.sizes import format_size

NUM_RENAME_TRIES, RENAME_PAUSE_S = 10, 0.05
"""Windows refuses to rename what a virus scanner or an indexer has open for a moment."""
Bytes = bytes | bytearray | memoryview


class OpenFile(Protocol):
    def write(self, data: Bytes) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Disk:
    """The real disk. Methods raise OSError."""

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def create(self, path: Path) -> OpenFile:
        """A new, empty file in place of what was there."""
        return _RealFile(path)

    def sync_file(self, path: Path) -> None:
        """Flush a file that somebody else wrote."""
        with open(path, "r+b") as file:
            os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        if os.name == "nt":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Replaces a file `new`; a folder `new` must not be there."""
        for remaining in reversed(range(NUM_RENAME_TRIES)):
            try:
                return os.replace(old, new)
            except PermissionError:
                if os.name != "nt" or not remaining:
                    raise
                time.sleep(RENAME_PAUSE_S)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Bytes free where `path` is, or will be."""
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free


class _RealFile:
    def __init__(self, path: Path) -> None:
        self.file: Any = open(path, "wb", buffering=0)

    def write(self, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = self.file.write(view)
            if not written:
                raise OSError(errno.EIO, "nothing was written")
            view = view[written:]

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


REAL_DISK = Disk()


def write_file(disk: Disk, path: Path, chunks: Iterable[Bytes]) -> None:
    """A file with these bytes, flushed."""
    file = disk.create(path)
    try:
        for chunk in chunks:
            file.write(chunk)
        file.sync()
    finally:
        file.close()


def replace_file(path: Path, text: str, disk: Disk = REAL_DISK, errors: str = "strict") -> None:
    """The old file or the new one, whole, whenever the machine stops; the new one once this returns."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(disk, partial, [text.encode("utf-8", errors)])
    disk.rename(partial, path)
    disk.sync_folder(path.parent)


def remove_tree(disk: Disk, folder: Path) -> None:
    """Remove a folder and all that is in it; what cannot be removed stays, and links are never followed."""
    try:
        if folder.is_symlink():
            return disk.unlink(folder)
        for path in sorted(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                remove_tree(disk, path)
            else:
                disk.unlink(path)
        disk.rmdir(folder)
    except OSError:
        return


@contextmanager
def writing(path: Path, what: str, needed_bytes: int = 0, disk: Disk = REAL_DISK) -> Iterator[None]:
    """Context: a write that fails is a LowmemError that says what it needed and what is free."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise LowmemError(
            f"{path}: {what} could not be written: {reason}. {_space(disk, path, needed_bytes)} The last checkpoint is "
            f"untouched: make room or fix the disk, then type lowmem resume on the run folder."
        ) from error


def _space(disk: Disk, path: Path, needed_bytes: int) -> str:
    needed = f"It needs {format_size(needed_bytes)} ({needed_bytes} bytes); " if needed_bytes else ""
    try:
        free = disk.free_bytes(path)
    except OSError:
        return f"{needed}the disk does not say how much is free."
    return f"{needed}{format_size(free)} ({free} bytes) are free there."
