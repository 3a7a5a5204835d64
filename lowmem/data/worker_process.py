"""A worker process as the training process sees it: started, spoken to, ended."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lowmem
from lowmem.data.worker import Answer, Introduction, Task, receive, send

CODE = "import sys; sys.path.insert(0, {root!r}); import lowmem.data.worker as w; sys.path.append(sys.path.pop(0)); w.main()"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
END_S = 2.0
"""A worker that has not ended this long after its input did is killed."""


@dataclass(eq=False)
class WorkerProcess:
    """One process; `tasks` is what it holds, by number and in its order, and `listener` the thread that hears it."""

    number: int
    process: "subprocess.Popen[bytes]"
    heard: float
    started: bool = False
    silent_looks: int = 0
    tasks: dict[int, Any] = field(default_factory=dict)
    listener: threading.Thread | None = None

    def __str__(self) -> str:
        return f"Loader worker {self.number} (process {self.process.pid})"

    @property
    def hung(self) -> bool:
        """Silent at two looks in a row, so that a sign of life that waits in the pipe is not missed."""
        return self.silent_looks > 1

    def send(self, message: Introduction | Task) -> None:
        """Where the process is gone nothing happens: its listener sees that."""
        with suppress(OSError):
            send(self.process.stdin, message)  # type: ignore[arg-type]

    def receive(self) -> Answer | None:
        """Its next answer; None where it is gone."""
        try:
            answer: Answer | None = receive(self.process.stdout)  # type: ignore[arg-type]
        except (OSError, ValueError):
            return None
        return answer

    def close_input(self) -> None:
        """It ends by itself then."""
        with suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]

    def end(self) -> None:
        """Wait for it, or kill it."""
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.listener is not None:
            self.listener.join(END_S)
        with suppress(OSError):
            self.process.stdout.close()  # type: ignore[union-attr]


def start_worker(number: int, introduction: Introduction, files: tuple[int, ...]) -> WorkerProcess:
    """A slim interpreter that inherits the `files` of shared memory and knows its sources."""
    command = [sys.executable, "-P", "-c", CODE.format(root=str(Path(lowmem.__file__).parent.parent))]
    process = subprocess.Popen(
        [*command, json.dumps(files[0] if files else None)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=files,
        env={**os.environ, **ONE_THREAD},
        **_own_group(),
    )
    worker = WorkerProcess(number, process, time.monotonic())
    worker.send(introduction)
    return worker


def _own_group() -> dict[str, Any]:
    """Out of the terminal's group, so that Ctrl-C reaches the training process alone."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"process_group": 0}
