"""Counts the bytes of live tensors, on real CPU tensors and on fake ones.

A storage is counted from the first operation that returns it until it is freed, whoever holds it: Python, the autograd
graph, a gradient. So the count is what an allocator without rounding would hand out. With a limit, going past it raises
the out-of-memory error that a card would raise.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem.phases import current_phase
from lowmem.sizes import format_size

_HOST_DEPTH = [0]


@contextmanager
def host_memory() -> Iterator[None]:
    """Storages made inside are host memory: no meter counts them."""
    _HOST_DEPTH[0] += 1
    try:
        yield
    finally:
        _HOST_DEPTH[0] -= 1


@dataclass
class Allocation:
    """One storage's life, for a recorded timeline: `born` and `died` are times in allocations and frees."""

    num_bytes: int
    label: str
    born: int
    died: int | None = None


@dataclass
class Timeline:
    """Every allocation of a recorded stretch, in order; `live_now` maps storage addresses to allocations."""

    allocations: list[Allocation] = field(default_factory=list)
    live_now: dict[int, Allocation] = field(default_factory=dict)
    clock: int = 0

    def peak_time(self) -> int:
        """The first moment at which most bytes are live."""
        changes = [0] * (self.clock + 2)
        for item in self.allocations:
            changes[item.born] += item.num_bytes
            if item.died is not None:
                changes[item.died] -= item.num_bytes
        live = peak = when = 0
        for time, change in enumerate(changes):
            live += change
            if live > peak:
                peak, when = live, time
        return when

    def live_at(self, time: int) -> list[Allocation]:
        return [item for item in self.allocations if item.born <= time and (item.died is None or item.died > time)]


class MemoryMeter(TorchDispatchMode):
    """Context: counts `live_bytes` and `peak_bytes`; `limit_bytes` makes it raise torch.OutOfMemoryError.

    `label`, or the running phase where it is empty, is written into the timeline with each allocation, where one is recorded.
    `device_type` counts the tensors of that device only.
    """

    def __init__(
        self, limit_bytes: int | None = None, record: bool = False, device_type: str | None = None
    ) -> None:
        super().__init__()
        self.device_type = device_type
        self.limit_bytes = limit_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self.label = ""
        self.timeline = Timeline() if record else None
        self._live: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, at 10 microseconds an operation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, tuple | list):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        return result

    def adopt(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors that were there before the meter was switched on."""
        before, self.label = self.label, label
        for tensor in tensors:
            self._see(tensor)
        self.label = before

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def _see(self, tensor: Tensor) -> None:
        if self.device_type is not None and tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live or (_HOST_DEPTH[0] and self._ignore(storage, address)):
            return
        num_bytes = storage.nbytes()
        self._live[address] = weakref.ref(storage, partial(_on_freed, weakref.ref(self), address, num_bytes))
        self.live_bytes += num_bytes
        if self.timeline is not None:
            self._record(address, num_bytes)
        if self.limit_bytes is not None and self.live_bytes > self.limit_bytes:
            self._raise(num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _ignore(self, storage: Any, address: int) -> bool:
        self._live[address] = weakref.ref(storage, partial(_on_freed, weakref.ref(self), address, 0))
        return True

    def _freed(self, address: int, num_bytes: int) -> None:
        self._live.pop(address, None)
        if not num_bytes:
            return
        self.live_bytes -= num_bytes
        if self.timeline is not None:
            self.timeline.clock += 1
            self.timeline.live_now.pop(address).died = self.timeline.clock

    def _record(self, address: int, num_bytes: int) -> None:
        assert self.timeline is not None
        self.timeline.clock += 1
        item = Allocation(num_bytes, self.label or current_phase(), self.timeline.clock)
        self.timeline.allocations.append(item)
        self.timeline.live_now[address] = item

    def _raise(self, num_bytes: int) -> None:
        assert self.limit_bytes is not None
        raise torch.OutOfMemoryError(
            f"out of memory: tried to allocate {format_size(num_bytes)}; {format_size(self.live_bytes - num_bytes)} of "
            f"{format_size(self.limit_bytes)} were in use"
        )


def _on_freed(meter: "weakref.ref[MemoryMeter]", address: int, num_bytes: int, _: Any) -> None:
    """A storage is gone. The meter is held weakly, or every storage would keep it alive."""
    alive = meter()
    if alive is not None:
        alive._freed(address, num_bytes)
