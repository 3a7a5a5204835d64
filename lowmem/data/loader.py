"""Batches in the recipe's order, whatever the workers.

The order of an epoch and every pixel are functions of (seed, epoch, index), so an epoch can start at any batch, and 0 or 8 workers
of any kind give the same stream.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch

from lowmem.data.batch import HostBatch
from lowmem.data.pixels import Pixels
from lowmem.data.split import Split
from lowmem.data.workers import Job, Order, Tell, Workers, open_workers
from lowmem.memory.meter import host_memory
from lowmem.planning.plan import LoaderPlan
from lowmem.randomness import generator

LOOK_EVERY_BATCHES = 10
WAITED_FRAC = 0.02
"""More waiting than this is worth a worker more."""


class Waiting:
    """Context: the share of time in which batches were waited for; a training loader adds workers for it up to a limit, which changes
    no image and no order."""

    def __init__(self, max_workers: int, tell: Tell, clock: Callable[[], float] = time.perf_counter) -> None:
        self.max_workers, self.tell, self.clock = max_workers, tell, clock
        self.num_batches, self.waited_s = 0, 0.0
        self.since = self.began = clock()

    def __enter__(self) -> None:
        self.began = self.clock()

    def __exit__(self, *_: object) -> None:
        self.waited_s += self.clock() - self.began
        self.num_batches += 1

    def consider(self, workers: Workers) -> None:
        """After a step: look every few batches. The first stretch holds the start of workers and device, and is passed over."""
        if self.num_batches % LOOK_EVERY_BATCHES or workers.num_workers >= self.max_workers:
            return
        now = self.clock()
        waited_frac = self.waited_s / max(now - self.since, 1e-9)
        self.waited_s, self.since = 0.0, now
        if self.num_batches > LOOK_EVERY_BATCHES and waited_frac > WAITED_FRAC:
            workers.add()
            self.tell(
                f"The device waited for images {waited_frac:.0%} of the time: {workers.num_workers} workers from here on."
            )


def train_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The epoch's permutation of the training images, int64."""
    return generator(seed, "order", epoch).permutation(num_images)


class Loader:
    """Context: batches of one split. `shuffle_seed` None keeps the order and the last, smaller batch (evaluation).

    `workers` that several loaders share must know `pixels`, and stay open when a loader is closed. `rank` of `num_ranks` gets its
    part of every batch; the parts in the order of ranks are the batch.
    """

    def __init__(
        self,
        split: Split,
        pixels: Pixels,
        px: int,
        batch_size: int,
        plan: LoaderPlan,
        shuffle_seed: int | None = None,
        *,
        workers: Workers | None = None,
        rank: int = 0,
        num_ranks: int = 1,
        tell: Tell = lambda text: None,
    ) -> None:
        self.split, self.px, self.batch_size, self.plan = split, px, batch_size, plan
        self.shuffle_seed, self.rank, self.num_ranks = shuffle_seed, rank, num_ranks
        self.owns_workers = workers is None
        self.workers = open_workers(plan, [pixels]) if workers is None else workers
        limit = plan.max_workers if shuffle_seed is not None else 0
        self.waiting = Waiting(limit, tell)
        self.source = next(number for number, known in enumerate(self.workers.sources) if known is pixels)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_batches(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.shuffle_seed is not None else full + (rest > 0)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[HostBatch]:
        """The epoch's batches from number `start` on."""
        order = (
            np.arange(len(self.split))
            if self.shuffle_seed is None
            else train_order(self.shuffle_seed, epoch, len(self.split))
        )
        numbers = iter(range(start, self.num_batches))
        ahead: deque[tuple[np.ndarray, Job]] = deque()
        try:
            while True:
                for number in islice(numbers, self._num_ahead - len(ahead)):
                    indices_B = self._part(order[number * self.batch_size : (number + 1) * self.batch_size])
                    ahead.append((indices_B, self.workers.start(Order(self.source, epoch, indices_B, self.px))))
                if not ahead:
                    return
                with self.waiting:
                    batch = self._finish(*ahead.popleft())
                yield batch
                self.waiting.consider(self.workers)
        finally:
            for _, job in ahead:
                job.cancel()

    def close(self) -> None:
        if self.owns_workers:
            self.workers.close()

    @property
    def _num_ahead(self) -> int:
        return self.plan.prefetch_batches if self.workers.parallel else 1

    def _part(self, indices_B: np.ndarray) -> np.ndarray:
        first, last = (len(indices_B) * number // self.num_ranks for number in (self.rank, self.rank + 1))
        return indices_B[first:last]

    def _finish(self, indices_B: np.ndarray, job: Job) -> HostBatch:
        images_BHWC = job.result()
        with host_memory():
            labels_B = torch.from_numpy(self.split.labels[indices_B])
            if self.plan.pin_memory:
                labels_B = labels_B.pin_memory()
            return HostBatch(images_BHWC, labels_B, torch.from_numpy(indices_B))
