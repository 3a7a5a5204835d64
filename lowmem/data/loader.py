"""Batches in the recipe's order, whatever the workers.

The order of an epoch and every pixel are functions of (seed, epoch, index), so an epoch can start at any batch, and 0 or 8 workers
give the same stream. Workers are threads: Pillow releases Python's lock while it decodes, and a thread costs neither a
second interpreter nor a copy of the index. They live as long as the loader.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowmem.data.augment import AugmentLike, Draws, augmented, evaluated
from lowmem.data.batch import HostBatch
from lowmem.data.folder import Split
from lowmem.errors import LowmemError
from lowmem.memory.meter import host_memory
from lowmem.planning.plan import LoaderPlan
from lowmem.randomness import generator

Pixels = Callable[[int, int], np.ndarray]
"""(epoch, index) -> uint8 [px, px, 3]."""


@dataclass(frozen=True)
class TrainPixels:
    """Augmented images of a split."""

    split: Split
    recipe: AugmentLike
    px: int
    seed: int

    def __call__(self, epoch: int, index: int) -> np.ndarray:
        return augmented(self.split.path(index), self.recipe, self.px, Draws(self.seed, epoch, index))


@dataclass(frozen=True)
class EvalPixels:
    """Images of a split, resized and cropped in the centre."""

    split: Split
    px: int
    crop_frac: float

    def __call__(self, epoch: int, index: int) -> np.ndarray:
        return evaluated(self.split.path(index), self.px, self.crop_frac)


def train_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The epoch's permutation of the training images, int64."""
    return generator(seed, "order", epoch).permutation(num_images)


class Loader:
    """Context: batches of one split. `shuffle_seed` None keeps the order and the last, smaller batch (evaluation)."""

    def __init__(
        self, split: Split, pixels: Pixels, px: int, batch_size: int, plan: LoaderPlan, shuffle_seed: int | None = None
    ) -> None:
        self.split, self.pixels, self.px, self.batch_size, self.plan = split, pixels, px, batch_size, plan
        self.shuffle_seed = shuffle_seed
        threads = plan.workers if plan.kind == "threads" else 0
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="lowmem-loader") if threads else None

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
        ahead: deque[_Filling] = deque()
        try:
            while True:
                while len(ahead) < (self.plan.prefetch_batches if self.pool else 1):
                    number = next(numbers, None)
                    if number is None:
                        break
                    indices = order[number * self.batch_size : (number + 1) * self.batch_size]
                    ahead.append(self._start(epoch, indices))
                if not ahead:
                    return
                yield self._finish(ahead.popleft())
        finally:
            for filling in ahead:
                for future in filling.futures:
                    future.cancel()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, epoch: int, indices: np.ndarray) -> "_Filling":
        with host_memory():
            images_BHWC = torch.empty(
                (len(indices), self.px, self.px, 3), dtype=torch.uint8, pin_memory=self.plan.pin_memory
            )
        filling = _Filling(images_BHWC, indices, [])
        rows = images_BHWC.numpy()
        if self.pool is None:
            for row, index in enumerate(indices):
                self._fill(rows, row, epoch, int(index))
        else:
            filling.futures.extend(
                self.pool.submit(self._fill, rows, row, epoch, int(index)) for row, index in enumerate(indices)
            )
        return filling

    def _finish(self, filling: "_Filling") -> HostBatch:
        for future in filling.futures:
            future.result()
        with host_memory():
            labels_B = torch.from_numpy(self.split.labels[filling.indices])
            if self.plan.pin_memory:
                labels_B = labels_B.pin_memory()
            return HostBatch(filling.images_BHWC, labels_B, torch.from_numpy(filling.indices))

    def _fill(self, rows: np.ndarray, row: int, epoch: int, index: int) -> None:
        try:
            rows[row] = self.pixels(epoch, index)
        except Exception as error:  # whatever a file that changed under us provokes in a decoder
            raise LowmemError(
                f"{self.split.path(index)} can no longer be read: {type(error).__name__}: {error}."
            ) from error


@dataclass(frozen=True)
class _Filling:
    """A batch in the making."""

    images_BHWC: Tensor
    indices: np.ndarray
    futures: list[Future[None]]
