"""Worker processes: slim interpreters that fill shared memory, looked after by the training process.

The rows of a worker that is lost are made again by the others or by the one that takes its place (lost.py), so the batches stay the
same and in order. One that sends no sign of life is taken for hung and ended. An image at which two workers die in a row ends the
run, by name.
"""

import pickle
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lowmem.data.lost import Loss, Losses, is_too_silent
from lowmem.data.pixels import Pixels
from lowmem.data.shared import Key, new_memory
from lowmem.data.worker import Answer, Introduction, Task
from lowmem.data.worker_process import WorkerProcess, start_worker
from lowmem.data.workers import SLOW_S, Job, Order, Tell, new_images, tell_slow, unreadable
from lowmem.errors import LowmemError

ALIVE_S = 2.0
"""A worker that was heard within this time lives: if it has been at an image for long, that is the image's fault."""
LOOK_EVERY_S = 0.25
TASKS_AHEAD = 2
"""Tasks that a worker holds, so that it never waits for the training process."""
TASKS_PER_WORKER = 4
"""Into how many tasks a batch is cut for each worker; more even out images of unequal cost."""
MAX_DEATHS_AT_AN_IMAGE = 2


@dataclass(eq=False)
class ProcessJob:
    """A batch in the making, in one block of shared memory."""

    owner: "ProcessWorkers"
    order: Order
    place: tuple[Key, int]
    view: memoryview
    num_open: int
    error: LowmemError | None = None
    cancelled: bool = False

    def result(self) -> Tensor:
        return self.owner.result(self)

    def cancel(self) -> None:
        self.owner.cancel(self)


@dataclass(eq=False)
class OpenTask:
    task: Task
    job: ProcessJob
    given: float = 0.0
    deaths: int = 0


class ProcessWorkers:
    """See the top of this file. `python` and `memory` can be exchanged by tests."""

    parallel = True

    def __init__(self, sources: Sequence[Pixels], num_workers: int, pin_memory: bool, tell: Tell) -> None:
        self.sources, self.pin_memory, self.tell = sources, pin_memory, tell
        self.num_workers = num_workers
        self.memory = new_memory()
        self.introduction = self._introduction()
        self.changed = threading.Condition()
        self.queue: deque[OpenTask] = deque()
        self.free_blocks: dict[int, list[tuple[tuple[Key, int], memoryview]]] = {}
        self.notices: deque[str] = deque()
        self.fatal: LowmemError | None = None
        self.closing = False
        self.num_tasks = 0
        self.told: set[int] = set()
        self.losses = Losses()
        self.workers = [self._new_worker(number) for number in range(1, num_workers + 1)]

    def start(self, order: Order) -> Job:
        num_bytes = len(order.indices_B) * order.px**2 * 3
        with self.changed:
            place, view = self._block(num_bytes)
            job = ProcessJob(self, order, place, view, 0)
            for task in self._tasks(order, place):
                job.num_open += 1
                self.queue.append(OpenTask(task, job))
            self._hand_out()
        return job

    def result(self, job: ProcessJob) -> Tensor:
        with self.changed:
            while job.num_open and job.error is None and self.fatal is None:
                self.changed.wait(LOOK_EVERY_S)
                self._look()
                self._tell_notices()
            error = job.error or self.fatal
        self._tell_notices()
        if error is not None:
            job.cancel()
            raise error
        images_BHWC = new_images(job.order, self.pin_memory)
        images_BHWC.numpy().reshape(-1)[:] = np.frombuffer(job.view, dtype=np.uint8)[: images_BHWC.numel()]
        with self.changed:
            self._release(job)
        return images_BHWC

    def cancel(self, job: ProcessJob) -> None:
        """What no worker has begun is dropped; the block is free once the rest is done."""
        with self.changed:
            dropped = [item for item in self.queue if item.job is job]
            self.queue = deque(item for item in self.queue if item.job is not job)
            job.num_open -= len(dropped)
            if not job.cancelled:
                job.cancelled = True
                if not job.num_open:
                    self._release(job)

    def add(self) -> None:
        with self.changed:
            self.num_workers += 1
            self.workers.append(self._new_worker(self.num_workers))
            self._hand_out()

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.queue.clear()
        for worker in self.workers:
            worker.close_input()
        for worker in self.workers:
            worker.end()
        self.free_blocks.clear()
        with suppress(BufferError):
            self.memory.close()

    def _introduction(self) -> Introduction:
        """The sources pickled, with their arrays (the file index) in shared memory: one copy for all workers."""
        buffers: list[pickle.PickleBuffer] = []
        packed = pickle.dumps(tuple(self.sources), protocol=5, buffer_callback=buffers.append)
        arrays = []
        for buffer in buffers:
            raw = buffer.raw()
            key, view = self.memory.block(raw.nbytes)
            view[: raw.nbytes] = raw
            arrays.append((key, raw.nbytes))
        return Introduction(packed, tuple(arrays))

    def _new_worker(self, number: int) -> WorkerProcess:
        worker = start_worker(number, self.introduction, self.memory.inherited())
        worker.listener = threading.Thread(
            target=self._listen, args=(worker,), daemon=True, name=f"lowmem-loader-listener-{number}"
        )
        worker.listener.start()
        return worker

    def _tasks(self, order: Order, place: tuple[Key, int]) -> Iterator[Task]:
        num_rows = max(1, -(-len(order.indices_B) // (TASKS_PER_WORKER * self.num_workers)))
        for first in range(0, len(order.indices_B), num_rows):
            self.num_tasks += 1
            indices = tuple(int(index) for index in order.indices_B[first : first + num_rows])
            yield Task(self.num_tasks, order.source, order.epoch, indices, first, place, order.px)

    def _block(self, num_bytes: int) -> tuple[tuple[Key, int], memoryview]:
        free = self.free_blocks.get(num_bytes)
        if free:
            return free.pop()
        key, view = self.memory.block(num_bytes)
        return (key, num_bytes), view

    def _release(self, job: ProcessJob) -> None:
        self.free_blocks.setdefault(job.place[1], []).append((job.place, job.view))

    def _hand_out(self) -> None:
        """Give waiting tasks to the workers that have the fewest."""
        while self.queue:
            worker = min(self.workers, key=lambda item: len(item.tasks), default=None)
            if worker is None or len(worker.tasks) >= TASKS_AHEAD:
                return
            item = self.queue.popleft()
            item.given = time.monotonic()
            worker.tasks[item.task.number] = item
            worker.send(item.task)

    def _listen(self, worker: WorkerProcess) -> None:
        while True:
            answer = worker.receive()
            with self.changed:
                if answer is None:
                    self._lost(worker)
                    self.changed.notify_all()
                    return
                worker.heard, worker.started, worker.silent_looks = time.monotonic(), True, 0
                if answer.number is not None:
                    self._answered(worker, answer)
                    self.changed.notify_all()

    def _answered(self, worker: WorkerProcess, answer: Answer) -> None:
        item = worker.tasks.pop(answer.number)  # type: ignore[arg-type]
        if worker.tasks:  # the next one begins now
            next(iter(worker.tasks.values())).given = time.monotonic()
        job = item.job
        job.num_open -= 1
        if answer.error is not None:
            index, what = answer.error
            job.error = job.error or unreadable(self.sources[job.order.source], index, what)
        if job.cancelled and not job.num_open:
            self._release(job)
        if not self.closing:
            self._hand_out()

    def _lost(self, worker: WorkerProcess) -> None:
        """A worker is gone: its tasks go first in the queue, and another may take its place."""
        if self.closing or worker not in self.workers:
            return
        self.workers.remove(worker)
        loss = Loss(str(worker), worker.process.wait(), worker.hung, worker.started)
        verdict = self.losses.judge(loss, len(self.workers))
        items = [item for item in worker.tasks.values() if not self._dropped(item)]
        if items:
            items[0].deaths += 1
            if items[0].deaths >= MAX_DEATHS_AT_AN_IMAGE:
                self.fatal = self._deadly(items[0], verdict.cause)
        self.queue.extendleft(reversed(items))
        if verdict.fatal:
            self.fatal = LowmemError(verdict.text)
        else:
            self.notices.append(verdict.text)
        if verdict.replacement:
            self.workers.append(self._new_worker(worker.number))
        self._hand_out()

    def _dropped(self, item: OpenTask) -> bool:
        """A task whose batch is not wanted any more is done with its worker."""
        if item.job.cancelled:
            item.job.num_open -= 1
            if not item.job.num_open:
                self._release(item.job)
        return item.job.cancelled

    def _deadly(self, item: OpenTask, cause: str) -> LowmemError:
        source = self.sources[item.job.order.source]
        split = getattr(source, "split", None)
        names = [f"image {index}" if split is None else str(split.path(index)) for index in item.task.indices]
        return LowmemError(
            f"{cause}, the second one at the same images. Move them away or repair them: {', '.join(names)}."
        )

    def _look(self) -> None:
        """Find workers without a sign of life, and images that take long."""
        now = time.monotonic()
        for worker in list(self.workers):
            if is_too_silent(now - worker.heard, worker.started):
                worker.silent_looks += 1
                if worker.hung:
                    worker.process.kill()
        for worker in self.workers:
            item = next(iter(worker.tasks.values()), None)
            if item is not None and now - worker.heard < ALIVE_S and now - item.given > SLOW_S:
                self._tell_slow(item, now - item.given)

    def _tell_slow(self, item: OpenTask, waited_s: float) -> None:
        try:
            tell_slow(
                self.notices.append, self.sources[item.job.order.source], item.task.indices[0], waited_s, self.told
            )
        except LowmemError as error:
            self.fatal = error

    def _tell_notices(self) -> None:
        while self.notices:
            self.tell(self.notices.popleft())
