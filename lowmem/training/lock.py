"""A run folder belongs to one process: a lock of the operating system on RUN/run.lock, which ends with its holder, however it dies.

A holder that is done removes the file. One that was killed leaves it, with what its successor needs to say why.
"""

import json
import os
from typing import Any

import psutil

from lowmem.errors import LowmemError
from lowmem.memory.pressure import num_oom_kills
from lowmem.training.folder import RunFolder

LOCKED_BYTE = 2**30
"""Windows locks bytes against reading too; this one is far past the end, so that the holder's name can be read."""
RESTART_S = 60
"""Two readings of the time at which the system started differ by less: it is computed from a clock that is put right."""


class RunLock:
    """Context: the run folder is this process's alone; raises LowmemError naming the holder where it is another's."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.file: Any = None
        self.last_end = ""
        """How the last holder ended, where it left without removing the file: a part of a sentence."""

    def __enter__(self) -> "RunLock":
        try:
            self._acquire()
        except OSError as error:
            raise LowmemError(
                f"{self.folder.path}: cannot be locked: {error.strerror or error}. Name a folder on a disk that can be written."
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if os.name == "nt":  # an open file cannot be removed there
            self._close()
        try:
            self.folder.lock.unlink(missing_ok=True)
        except OSError:
            pass
        self._close()

    def _acquire(self) -> None:
        while True:
            self.file = open(self.folder.lock, "a+b")
            if not _try_lock(self.file):
                holder = self._holder()
                self._close()
                raise LowmemError(
                    f"{self.folder.path} is in use by another run{holder}. Wait for it, or stop it with Ctrl-C."
                )
            if self._is_still_there():
                break
            self._close()  # its last holder removed it between our opening and our locking
        self.last_end = _end_of_holder(self._facts())
        facts = {"pid": os.getpid(), "started": psutil.boot_time(), "oom_kills": num_oom_kills()}
        self.file.truncate(0)
        self.file.write(json.dumps(facts).encode())
        self.file.flush()

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.folder.lock))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        number = self._facts().get("pid")
        return f" (process {number})" if isinstance(number, int) else ""

    def _facts(self) -> dict[str, Any]:
        """What the holder wrote of itself; empty where it wrote nothing."""
        try:
            facts = json.loads(self.folder.lock.read_bytes())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _end_of_holder(facts: dict[str, Any]) -> str:
    started, oom_kills = facts.get("started"), facts.get("oom_kills")
    if not isinstance(started, int | float) or not isinstance(oom_kills, int):
        return "was killed or has crashed" if facts else ""
    if abs(psutil.boot_time() - started) > RESTART_S:
        return "ended with the machine, which was started anew since"
    if num_oom_kills() > oom_kills:
        return (
            "was killed, and the system's memory killer has struck since it began: host memory was full. Close other programs, "
            "use fewer loader workers, or another --vram, so that less is offloaded"
        )
    return "was killed or has crashed"


def _try_lock(file: Any) -> bool:
    if os.name == "nt":
        import msvcrt

        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        file.seek(0)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
