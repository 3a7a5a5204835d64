"""The command line in a process of its own, which can be killed: what runs there, and the faults that are put into it."""

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISK_CALLS = ("mkdir", "create", "sync_folder", "rename", "unlink", "rmdir")


@dataclass(frozen=True)
class Fault:
    """What befalls the child: at the `at_call`-th call that its disk gets for a checkpoint, `signal_number` arrives."""

    at_call: int
    signal_number: int


def command(arguments: list[str], output: str, fault: Fault | None = None, max_file_bytes: int | None = None) -> None:
    """Entry of the process: one command of lowmem, its output in a file, its exit code that of the process."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from lowmem import cli
    from lowmem.training import keeping

    torch.set_num_threads(1)
    gc.freeze()  # torch and timm need not be looked through
    keeping.draw_figures = lambda run: None  # a second of pictures for a second of training
    if fault is not None:
        put_into_disk(fault)
    if max_file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
    sys.argv = ["lowmem", *arguments]
    os.environ["COLUMNS"] = "200"
    cli.main()


def put_into_disk(fault: Fault) -> None:
    """Count the disk's calls for checkpoints, and strike in the middle of one; half of a write has happened then."""
    from lowmem import disk

    count = [0]

    def strikes(path: Path) -> bool:
        if "checkpoints" not in path.parts:
            return False
        count[0] += 1
        return count[0] == fault.at_call

    def strike() -> None:
        os.kill(os.getpid(), fault.signal_number)

    for name in DISK_CALLS:
        setattr(disk.Disk, name, _struck(getattr(disk.Disk, name), strikes, strike))
    write, sync, create = disk._RealFile.write, disk._RealFile.sync, disk._RealFile.__init__

    def remember(self: Any, path: Path) -> None:
        create(self, path)
        self.path = path

    def half_write(self: Any, data: Any) -> None:
        if strikes(self.path):
            view = memoryview(data).cast("B")
            write(self, view[: len(view) // 2])
            strike()
            write(self, view[len(view) // 2 :])
        else:
            write(self, data)

    def no_sync(self: Any) -> None:
        if strikes(self.path):
            strike()
        sync(self)

    disk._RealFile.__init__, disk._RealFile.write, disk._RealFile.sync = remember, half_write, no_sync


def _struck(
    method: Callable[..., Any], strikes: Callable[[Path], bool], strike: Callable[[], None]
) -> Callable[..., Any]:
    def call(self: Any, path: Path, *others: Any) -> Any:
        if strikes(path):
            strike()
        return method(self, path, *others)

    return call


KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
