"""The budget, enforced: a run that would exceed it gets an out-of-memory error, never a spill to host memory.

On CUDA the caching allocator is given the limit, so that no driver can spill. On a CPU, where a budget stands in for a card,
live tensors are counted; counting costs time, and a step's allocations are the same every time, so each kind of step
(training, evaluation) is counted over its first `NUM_COUNTED` runs after every change of plan.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lowmem.memory.meter import MemoryMeter
from lowmem.planning.plan import Budget

NUM_COUNTED = 3
OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "alloc_failed",
    "cudnn_status_not_supported",
    "unable to find an engine",
    "cudnn_status_internal_error",
    "can't allocate memory",
    "not enough memory",
)
"""What cuBLAS, cuDNN and the CPU allocator say when they cannot get memory (pytorch #27600, #32395 and others)."""


class Enforcement(Protocol):
    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors seen at once since `reset_peak`."""

    def watch(self, kind: str) -> AbstractContextManager[None]:
        """Context around one training step or one evaluation (`kind`)."""

    def reset_peak(self) -> None: ...


def enforce(device: torch.device, budget: Budget | None, resident: Callable[[], Iterable[Tensor]]) -> Enforcement:
    """Hold `device` to the budget; `resident()` lists the tensors that live on it between steps."""
    if device.type == "cuda":
        return CudaLimit(device, budget.allocator_bytes if budget else None)
    return CountedLimit(budget.tensor_bytes if budget else None, resident)


class CudaLimit:
    """The caching allocator's own limit, for the whole process."""

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self.device = device
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            1.0 if limit_bytes is None else min(1.0, limit_bytes / total), device
        )

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        yield

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class CountedLimit:
    """Live tensors counted over the first runs of each kind of step."""

    def __init__(self, limit_bytes: int | None, resident: Callable[[], Iterable[Tensor]]) -> None:
        self.limit_bytes = limit_bytes
        self.resident = resident
        self.peaks: dict[str, int] = {}
        self.num_counted: Counter[str] = Counter()

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        if self.num_counted[kind] >= NUM_COUNTED:
            yield
            return
        meter = MemoryMeter(self.limit_bytes)
        meter.adopt(self.resident(), "resident")
        try:
            with meter:
                yield
        finally:
            self.num_counted[kind] += 1
            self.peaks[kind] = max(meter.peak_bytes, self.peaks.get(kind, 0))

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    def reset_peak(self) -> None:
        """Peaks repeat from epoch to epoch, so the counted ones stand."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, whoever noticed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY_SIGNS)


def recover() -> None:
    """Give back what a failed step held. Call it outside the `except` block: its traceback keeps the tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
