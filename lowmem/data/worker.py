"""A worker process: reads tasks from its standard input, fills shared memory with pixels, answers on its standard output.

It imports neither torch nor the caller's main module, so that it starts in a fraction of a second, is small, and needs no
`if __name__ == "__main__"` around the training. It ends when its input does, so it never outlives the training process.
"""

import json
import os
import pickle
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from lowmem.data.shared import Attached, Key

LENGTH = struct.Struct("<I")
HEARTBEAT_S = 0.5


@dataclass(frozen=True)
class Introduction:
    """The first message: where the pickled sources (functions of epoch and index) are, and their arrays."""

    sources: bytes
    arrays: tuple[tuple[Key, int], ...]


@dataclass(frozen=True)
class Task:
    """Rows of a batch: `indices` go to the rows from `first_row` on, in the block at `place` (key, bytes), of images of px x px."""

    number: int
    source: int
    epoch: int
    indices: tuple[int, ...]
    first_row: int
    place: tuple[Key, int]
    px: int


@dataclass(frozen=True)
class Answer:
    """`number` None: still alive. `error`: (index of the image, what happened)."""

    number: int | None = None
    error: tuple[int, str] | None = None


def send(stream: BinaryIO, message: object) -> None:
    packed = pickle.dumps(message, protocol=5)
    stream.write(LENGTH.pack(len(packed)) + packed)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    packed = stream.read(length)
    return pickle.loads(packed) if len(packed) == length else None


def main() -> None:
    """Work until the input ends; `sys.argv[1]` is the inherited file of shared memory, or null."""
    tasks, answers = _streams()
    memory = Attached(json.loads(sys.argv[1]))
    lock = threading.Lock()
    sources = _sources(receive(tasks), memory)
    send(answers, Answer())
    threading.Thread(target=_beat, args=(answers, lock), daemon=True).start()
    while (task := receive(tasks)) is not None:
        answer = _done(task, sources, memory)
        with lock:
            send(answers, answer)
    os._exit(0)


def _streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output as they were given; what libraries print goes to standard error."""
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return tasks, answers


def _sources(introduction: Introduction, memory: Attached) -> Any:
    buffers = [memory.block(key, num_bytes).toreadonly() for key, num_bytes in introduction.arrays]
    return pickle.loads(introduction.sources, buffers=buffers)


def _beat(answers: BinaryIO, lock: threading.Lock) -> None:
    while True:
        time.sleep(HEARTBEAT_S)
        with lock:
            try:
                send(answers, Answer())
            except OSError:  # the training process is gone
                os._exit(0)


def _done(task: Task, sources: Any, memory: Attached) -> Answer:
    image_bytes = 3 * task.px**2
    used = memory.block(*task.place)[: (task.first_row + len(task.indices)) * image_bytes]
    rows = np.frombuffer(used, dtype=np.uint8).reshape(-1, task.px, task.px, 3)
    for row, index in enumerate(task.indices, task.first_row):
        try:
            rows[row] = sources[task.source](task.epoch, index)
        except Exception as error:  # whatever a file that changed under us provokes in a decoder
            return Answer(task.number, (index, f"{type(error).__name__}: {error}"))
    return Answer(task.number)
