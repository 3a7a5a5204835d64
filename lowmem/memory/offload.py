"""Tensors saved for the backward pass, waiting in host memory.

A tensor is copied to a pinned buffer while the forward pass goes on, and fetched back ahead of its use in the backward
pass, block by block: every block of a plan that offloads tells the store when it begins, whether or not it offloads itself. Host
buffers are allocated once and reused (pytorch #186161: allocating them costs about 3 ms each). On CUDA both copies run on a side
stream; device memory is released one block later, after the main stream was told to wait for the copy, so no buffer can be reused
while it is still being read. On a CPU the copies are plain, and the host's share is not counted by the meter.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import LowmemError
from lowmem.memory.meter import host_memory
from lowmem.memory.pinned import HostArena

MIN_OFFLOAD_BYTES = 64 * 1024
"""Smaller tensors are not worth a copy."""


@dataclass(eq=False)
class Ticket:
    """One tensor on its way: on the device, on the host, and back."""

    host: Tensor
    flat: Tensor
    source: Tensor | None
    """Held until the copy to the host is known to be ordered before any reuse."""
    group: "Group"
    """Of the last block that needs it."""
    version: int
    num_uses: int = 1
    copied: torch.cuda.Event | None = None
    device_copy: Tensor | None = None
    fetched: torch.cuda.Event | None = None


@dataclass(eq=False)
class Group:
    """The tickets of one block, in the order in which they were put."""

    before: "Group | None" = None
    tickets: list[Ticket] = field(default_factory=list)
    prefetched: bool = False


class HostStore:
    """All offloaded tensors of a model on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.arena = HostArena(pinned=device.type == "cuda")
        self.free: dict[int, list[Tensor]] = defaultdict(list)
        self.groups: list[Group] = []
        self.known: dict[tuple[int, int, torch.Size, tuple[int, ...]], Ticket] = {}
        self.host_bytes = 0
        """Host memory held, in use or waiting to be used again."""

    def begin_block(self) -> Group:
        """A block's forward pass starts: what the block before the last one put is released on the device."""
        if len(self.groups) > 1:
            self._release(self.groups[-2])
        self.groups.append(Group(self.groups[-1] if self.groups else None))
        return self.groups[-1]

    def end_forward(self) -> None:
        """The last block is done."""
        for group in self.groups[-2:]:
            self._release(group)
        self.known.clear()

    def put(self, tensor: Tensor) -> Ticket:
        """Start copying a tensor to the host; the same tensor put twice travels once."""
        key = (tensor.untyped_storage()._cdata, tensor._version, tensor.shape, tensor.stride())
        ticket = self.known.get(key)
        if ticket is not None and ticket.source is not None:
            ticket.num_uses += 1
            if ticket.group is not self.groups[-1]:
                ticket.group = self.groups[-1]
                ticket.group.tickets.append(ticket)
            return ticket
        ticket = self._copy_out(tensor)
        self.known[key] = ticket
        self.groups[-1].tickets.append(ticket)
        return ticket

    def get(self, ticket: Ticket) -> Tensor:
        """The tensor on the device again; it starts fetching the block before this one."""
        self.fetch_ahead(ticket.group)
        if ticket.source is not None and ticket.device_copy is None:
            self._release(Group([ticket]))
        if ticket.device_copy is None:
            self._copy_back(ticket)
        if ticket.fetched is not None:
            torch.cuda.current_stream(self.device).wait_event(ticket.fetched)
            ticket.fetched = None
        tensor = ticket.device_copy
        assert tensor is not None
        ticket.num_uses -= 1
        if ticket.num_uses == 0:
            ticket.device_copy = None
            self.free[ticket.flat.nbytes].append(ticket.flat)
        return tensor

    def end_backward(self) -> None:
        """The pass is over: buffers that were never fetched (their gradients were not needed) are free again."""
        self.reset()

    def reset(self) -> None:
        """Forget a pass: what was never asked back, or a step that failed; the buffers are kept."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(
                self.stream
            )  # it may still write to device copies dropped here
        for group in self.groups:
            for ticket in group.tickets:
                ticket.source = ticket.device_copy = None
                if ticket.num_uses > 0:
                    ticket.num_uses = 0
                    self.free[ticket.flat.nbytes].append(ticket.flat)
            group.before = None
            group.tickets.clear()  # tickets and groups know each other, and nothing collects cycles during an epoch
        self.groups.clear()
        self.known.clear()

    def _copy_out(self, tensor: Tensor) -> Ticket:
        with host_memory():
            flat = self._buffer(tensor.nbytes)
            host = flat.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        ticket = Ticket(host, flat, tensor, self.groups[-1], tensor._version)
        if self.stream is None:
            host.copy_(tensor)
            return ticket
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
            ticket.copied = torch.cuda.Event()
            ticket.copied.record(self.stream)
        return ticket

    def _buffer(self, num_bytes: int) -> Tensor:
        waiting = self.free[num_bytes]
        if waiting:
            return waiting.pop()
        self.host_bytes += num_bytes
        return self.arena.take(num_bytes)

    def _copy_back(self, ticket: Ticket) -> None:
        host = ticket.host
        ticket.device_copy = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self.device)
        if self.stream is None:
            ticket.device_copy.copy_(host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            ticket.device_copy.copy_(host, non_blocking=True)
            ticket.fetched = torch.cuda.Event()
            ticket.fetched.record(self.stream)

    def _release(self, group: Group) -> None:
        for ticket in group.tickets:
            if ticket.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(ticket.copied)
                ticket.copied = None
            if ticket.source is not None and ticket.source._version != ticket.version:
                raise LowmemError(
                    "A tensor was changed in place on its way to host memory; the plan must not offload it."
                )
            ticket.source = None

    def fetch_ahead(self, group: Group) -> None:
        """A block's backward pass starts: fetch what it put, and what the block before it put."""
        for near in (group, group.before):
            if near is None or near.prefetched:
                continue
            near.prefetched = True
            for other in reversed(near.tickets):
                if other.num_uses > 0 and other.device_copy is None and other.source is None:
                    self._copy_back(other)
