"""Who makes the pixels of a batch: the training process itself, threads in it, or slim processes beside it.

All give the same pixels, since an image is a function of (epoch, index); they differ in speed, in memory and in what they take from the
training step.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowmem.data.pixels import Pixels
from lowmem.errors import LowmemError
from lowmem.memory.meter import host_memory
from lowmem.planning.plan import LoaderPlan

SLOW_S = 8.0
"""An image that takes this long is named."""
GIVE_UP_S = 120.0
"""An image that takes this long ends the run: a file system that does not answer, most likely."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """One batch that is wanted: images `indices_B` of a source in one epoch, of px x px."""

    source: int
    epoch: int
    indices_B: np.ndarray
    px: int


class Job(Protocol):
    """A batch in the making."""

    def result(self) -> Tensor:
        """The pixels, uint8 [B, px, px, 3], once they are there; raises LowmemError where they cannot be made."""

    def cancel(self) -> None:
        """The batch is not wanted any more."""


class Workers(Protocol):
    """Makes batches out of `sources`; `parallel` says whether orders are worked on ahead of their results."""

    sources: Sequence[Pixels]
    parallel: bool
    num_workers: int

    def start(self, order: Order) -> Job: ...

    def add(self) -> None:
        """One worker more, from the next order on."""

    def close(self) -> None: ...


def open_workers(plan: LoaderPlan, sources: Sequence[Pixels], tell: Tell = lambda text: None) -> Workers:
    """The workers of a plan; `tell` hears of slow images and of workers that were lost."""
    if plan.kind == "inline" or plan.workers == 0:
        return InlineWorkers(sources, plan.pin_memory)
    if plan.kind == "threads":
        return ThreadWorkers(sources, plan.workers, plan.pin_memory, tell)
    from lowmem.data.processes import ProcessWorkers

    return ProcessWorkers(sources, plan.workers, plan.pin_memory, tell)


def new_images(order: Order, pin_memory: bool) -> Tensor:
    """Room for a batch in host memory, pinned where a card will fetch it."""
    with host_memory():
        return torch.empty((len(order.indices_B), order.px, order.px, 3), dtype=torch.uint8, pin_memory=pin_memory)


def unreadable(source: Pixels, index: int, what: str) -> LowmemError:
    split = getattr(source, "split", None)
    return LowmemError(f"{f'image {index}' if split is None else split.path(index)} can no longer be read: {what}.")


def fill(rows: np.ndarray, row: int, source: Pixels, epoch: int, index: int) -> None:
    """Make one image; raises LowmemError where its file cannot be read any more."""
    try:
        rows[row] = source(epoch, index)
    except Exception as error:  # whatever a file that changed under us provokes in a decoder
        raise unreadable(source, index, f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class ReadyJob:
    images_BHWC: Tensor

    def result(self) -> Tensor:
        return self.images_BHWC

    def cancel(self) -> None:
        pass


class InlineWorkers:
    """Makes a batch when it is asked for, in the caller's thread."""

    parallel = False
    num_workers = 0

    def __init__(self, sources: Sequence[Pixels], pin_memory: bool) -> None:
        self.sources, self.pin_memory = sources, pin_memory

    def start(self, order: Order) -> Job:
        images_BHWC = new_images(order, self.pin_memory)
        rows = images_BHWC.numpy()
        for row, index in enumerate(order.indices_B):
            fill(rows, row, self.sources[order.source], order.epoch, int(index))
        return ReadyJob(images_BHWC)

    def add(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class ThreadJob:
    """One future for each image."""

    images_BHWC: Tensor
    source: Pixels
    indices_B: np.ndarray
    futures: list[Future[None]]
    tell: Tell
    told: set[int] = field(default_factory=set)

    def result(self) -> Tensor:
        for row, future in enumerate(self.futures):
            self._wait_for(row, future)
        return self.images_BHWC

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()

    def _wait_for(self, row: int, future: Future[None]) -> None:
        started = time.monotonic()
        while True:
            try:
                return future.result(SLOW_S)
            except FutureTimeout:
                waited_s = time.monotonic() - started
                tell_slow(self.tell, self.source, int(self.indices_B[row]), waited_s, self.told)


class ThreadWorkers:
    """Threads: Pillow releases Python's lock while it decodes and resizes, and a thread costs neither a second interpreter nor a start."""

    parallel = True

    def __init__(self, sources: Sequence[Pixels], num_workers: int, pin_memory: bool, tell: Tell) -> None:
        self.sources, self.pin_memory, self.tell = sources, pin_memory, tell
        self.num_workers = num_workers
        self.pool = ThreadPoolExecutor(num_workers, thread_name_prefix="lowmem-loader")

    def start(self, order: Order) -> Job:
        images_BHWC = new_images(order, self.pin_memory)
        rows, source = images_BHWC.numpy(), self.sources[order.source]
        futures = [
            self.pool.submit(fill, rows, row, source, order.epoch, int(index))
            for row, index in enumerate(order.indices_B)
        ]
        return ThreadJob(images_BHWC, source, order.indices_B, futures, self.tell)

    def add(self) -> None:
        """A wider pool takes the next orders; the old one ends with its own."""
        self.pool.shutdown(wait=False)
        self.num_workers += 1
        self.pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="lowmem-loader")

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def tell_slow(tell: Tell, source: Pixels, index: int, waited_s: float, told: set[int]) -> None:
    """Name an image that takes long, once; raises LowmemError where it takes too long."""
    split = getattr(source, "split", None)
    name = f"image {index}" if split is None else str(split.path(index))
    if waited_s > GIVE_UP_S:
        raise LowmemError(
            f"{name} has not come for {waited_s:.0f} s. Does its disk or network drive still answer? Then: lowmem resume RUN."
        )
    if index not in told:
        told.add(index)
        tell(f"{name} has been loading for {waited_s:.0f} s; the run waits for it.")
