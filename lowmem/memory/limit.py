"""The budget, enforced: a run that would exceed it gets an out-of-memory error, never a spill to host memory.

On CUDA the caching allocator is given the limit, so that no driver can spill. On a CPU, where a budget stands in for a card,
live tensors are counted; counting costs time, and a step's allocations are the same every time, so each kind of step
(training, evaluation) is counted over its first `NUM_COUNTED` runs after every change of plan.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from lowmem.memory.census import breakdown_at_peak, naming_gradients
from lowmem.memory.meter import MemoryMeter
from lowmem.planning.plan import Budget, MemoryBreakdown

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


Resident = Callable[[], dict[str, list[Tensor]]]
"""What lives on the device between steps, by what it is for (a field of MemoryBreakdown)."""


class Enforcement(Protocol):
    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors seen at once since `reset_peak`."""

    @property
    def peak_breakdown(self) -> MemoryBreakdown | None:
        """What a training step's peak was for; None before the first."""

    def watch(self, kind: str) -> AbstractContextManager[None]:
        """Context around one training step or one evaluation (`kind`)."""

    def reset_peak(self) -> None: ...


def enforce(device: torch.device, budget: Budget | None, resident: Resident) -> Enforcement:
    """Hold `device` to the budget."""
    if device.type == "cuda":
        return CudaLimit(device, budget.allocator_bytes if budget else None, resident)
    return CountedLimit(budget.tensor_bytes if budget else None, resident)


class CudaLimit:
    """The caching allocator's own limit, for the whole process. The first step of each kind is also counted, to tell what the peak
    was for; what the allocator has beyond the tensors (rounding, the libraries' workspaces) is workspace."""

    def __init__(self, device: torch.device, limit_bytes: int | None, resident: Resident = dict) -> None:
        self.device, self.resident = device, resident
        self.peaks: dict[str, MemoryBreakdown] = {}
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            1.0 if limit_bytes is None else min(1.0, limit_bytes / total), device
        )

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        if kind in self.peaks or not kind.startswith("training"):
            yield
            return
        meter, resident = MemoryMeter(record=True, device_type="cuda"), self.resident()
        _adopt(meter, resident)
        with _counting(meter, resident):
            yield
        self.peaks[kind] = _breakdown(meter)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    @property
    def peak_breakdown(self) -> MemoryBreakdown | None:
        found = _largest(self.peaks)
        if found is None:
            return None
        beyond = max(0, self.peak_bytes - found.total)
        return found.model_copy(update={"workspace": found.workspace + beyond})

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class CountedLimit:
    """Live tensors counted over the first runs of each kind of step; the first run of each is recorded as well."""

    def __init__(self, limit_bytes: int | None, resident: Resident) -> None:
        self.limit_bytes = limit_bytes
        self.resident = resident
        self.peaks: dict[str, int] = {}
        self.breakdowns: dict[str, MemoryBreakdown] = {}
        self.num_counted: Counter[str] = Counter()

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        if self.num_counted[kind] >= NUM_COUNTED:
            yield
            return
        recorded = kind.startswith("training") and kind not in self.breakdowns
        meter, resident = MemoryMeter(self.limit_bytes, record=recorded), self.resident()
        _adopt(meter, resident)
        try:
            with _counting(meter, resident):
                yield
        finally:
            self.num_counted[kind] += 1
            self.peaks[kind] = max(meter.peak_bytes, self.peaks.get(kind, 0))
        if meter.timeline is not None:
            self.breakdowns[kind] = _breakdown(meter)

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values(), default=0)

    @property
    def peak_breakdown(self) -> MemoryBreakdown | None:
        return _largest(self.breakdowns)

    def reset_peak(self) -> None:
        """Peaks repeat from epoch to epoch, so the counted ones stand."""


def _adopt(meter: MemoryMeter, resident: dict[str, list[Tensor]]) -> None:
    for label, tensors in resident.items():
        meter.adopt(tensors, label)


@contextmanager
def _counting(meter: MemoryMeter, resident: dict[str, list[Tensor]]) -> Iterator[None]:
    weights = resident.get("weights", []) if meter.timeline is not None else []
    with naming_gradients(meter, weights), meter:
        yield


def _breakdown(meter: MemoryMeter) -> MemoryBreakdown:
    assert meter.timeline is not None
    return breakdown_at_peak(meter.timeline)


def _largest(breakdowns: dict[str, MemoryBreakdown]) -> MemoryBreakdown | None:
    return max(breakdowns.values(), key=lambda found: found.total, default=None)


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
