"""Checkpoints written beside training: a copy of the state into one host buffer that is used again and again, and a thread that
writes the buffer to the disk while the next steps run.

The step waits for the copy only. A save that is due while the last one is still being written waits for a later step, unless it
must not be missed (an epoch's end, a stop). The buffer takes the bytes of the weights, statistics and optimizer state once, in ordinary
host memory: pinned memory would copy faster, but is scarce on Windows and handed out in powers of two (pytorch #95823).
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import LowmemError
from lowmem.memory.meter import host_memory
from lowmem.training.checkpoint import Checkpoint, Checkpoints, Tensors
from lowmem.training.engine import Engine
from lowmem.training.state import RunState

NICENESS = 10
Written = Callable[[Path, float, int], None]
"""(checkpoint, seconds, bytes of the host buffer): told of each checkpoint that is on the disk, by the thread that wrote it."""


class HostBuffer:
    """Host copies of named tensors; allocated once and overwritten by every `take`."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def take(self, named: Iterable[tuple[str, Tensor]]) -> Tensors:
        """The buffer with the values of these tensors; complete when it returns."""
        with host_memory(), torch.no_grad():
            for name, tensor in named:
                self._room_for(name, tensor).copy_(tensor)
        return self.tensors

    def _room_for(self, name: str, tensor: Tensor) -> Tensor:
        room = self.tensors.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = self.tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return room


class Saver:
    """Context: writes checkpoints of one engine, at most one at a time, in the background."""

    def __init__(self, checkpoints: Checkpoints, written: Written = lambda path, seconds, host_bytes: None) -> None:
        self.checkpoints, self.written = checkpoints, written
        self.model, self.optimizer = HostBuffer(), HostBuffer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the last write, unless the user wants to be gone: then it is cut off, which loses nothing."""
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._join()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def host_bytes(self) -> int:
        return self.model.num_bytes + self.optimizer.num_bytes

    def save(self, engine: Engine, state: RunState) -> None:
        """Copy the state now and write it beside what comes next."""
        self.write(self.copy(engine, state))

    def copy(self, engine: Engine, state: RunState) -> Checkpoint:
        """The state in the host buffer; waits for an earlier write of the buffer and raises its error."""
        self.wait()
        model = self.model.take(engine.model.state_dict().items())
        return Checkpoint(state, model, self.optimizer.take(engine.iter_optimizer_state()))

    def write(self, checkpoint: Checkpoint) -> None:
        """Write what `copy` gave beside what comes next."""
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="lowmem-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written; raises the error of the write."""
        self._join()
        self.check()

    def check(self) -> None:
        """Raises the error of a write that failed since the last look."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        started = time.perf_counter()
        try:
            _yield_to_training()
            refuse_not_finite(checkpoint)
            path = self.checkpoints.write(checkpoint)
            self.written(path, time.perf_counter() - started, self.host_bytes)
        except BaseException as error:  # the border of a thread: the training thread raises it
            self._error = error


def _yield_to_training() -> None:
    """The calling thread takes a tenth of a core where all are wanted: less, and a save would still run when the next one is due.
    Linux alone has priorities of threads for everybody."""
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def refuse_not_finite(checkpoint: Checkpoint) -> None:
    """Raises LowmemError where a tensor holds a NaN or an infinity: such a state is never kept."""
    name = checkpoint.not_finite()
    if name:
        raise LowmemError(not_finite_text(name, checkpoint.state.step, checkpoint.state.epoch))


def not_finite_text(what: str, step: int, epoch: int) -> str:
    return (
        f"{what} is no longer finite by step {step} of epoch {epoch}. The last good checkpoint and the best classifier are untouched. "
        f"A smaller learning rate usually cures it: lowmem resume RUN --set optimizer.lr=..., or a longer schedule.warmup_epochs, "
        f"optimizer.clip_norm=1, or amp=bf16 in a new run."
    )
