"""AdamW with its state in pinned host memory, streamed through two small staging buffers on the device, chunk by chunk."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import LowmemError
from lowmem.memory.adamw import STATE_NAMES, AdamW, Named, check_names
from lowmem.memory.meter import host_memory
from lowmem.sizes import MIB

STAGING_BYTES = 32 * MIB
"""Per staging buffer of the host placements; there are two, so that copies and updates overlap."""
CHUNK_ELEMENTS = STAGING_BYTES // 8
"""A larger weight is updated in parts."""
ARENA_ELEMENTS = 16 * MIB
"""64 MiB of float32: pinned memory is handed out in powers of two (pytorch #95823)."""


@dataclass(frozen=True)
class Chunk:
    """A run of one weight's elements in memory order, and its moments on the host."""

    name: str
    start: int
    stop: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def size(self) -> int:
        return self.stop - self.start


class HostOptimizer:
    """`in_backward`: each weight is updated during the backward pass, one weight behind, so that the copies hide."""

    def __init__(self, named: Named, arithmetic: AdamW, device: torch.device, in_backward: bool) -> None:
        self.named, self.arithmetic, self.device = named, arithmetic, device
        self.chunks = _chunks(named, pinned=device.type == "cuda")
        self.steps = {name: torch.zeros((), device=device) for name in named}
        self.slots = [torch.empty(num, device=device) for num in staging_sizes(named)]
        self.turn = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # the buffers may lie where kernels of the main stream still work
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self.armed = False
        self.found_inf: Tensor | None = None
        self.pending: tuple[list[Chunk], Tensor] | None = None
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._grad_is_complete, name=name))
            for name, parameter in (named.items() if in_backward else ())
        ]
        self.scratch = torch.optim.SGD(named.values(), lr=0.0)
        """Only a handle by which a GradScaler finds the gradients."""

    def arm(self) -> None:
        self.armed = True

    def update(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
        if self.hooks and (scaler is not None or clip_norm is not None):
            raise LowmemError(
                "The optimizer cannot run in the backward pass with gradient clipping or fp16: use another placement."
            )
        if scaler is not None:
            scaler.unscale_(self.scratch)
            self.found_inf = _found_inf(scaler, self.scratch)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), clip_norm)
        if not self.hooks:
            for group in _groups(
                [c for chunks in self.chunks.values() for c in chunks if self.named[c.name].grad is not None]
            ):
                self._enqueue(group)
        self._flush()
        if scaler is not None:
            scaler.update()
        for parameter in self.named.values():
            parameter.grad = None
        self.armed = False

    def set_lr(self, lr: float) -> None:
        self.arithmetic.lr = lr

    def state_tensors(self) -> dict[str, Tensor]:
        return dict(self.iter_state())

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        if self.stream is not None:
            self.stream.synchronize()
        for name in self.named:
            for kind in STATE_NAMES:
                yield f"{kind}/{name}", self._gathered(name, kind)
        yield from ((f"step/{name}", step) for name, step in self.steps.items())

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        check_names(self.state_tensors(), tensors)
        for name, parameter in self.named.items():
            self.steps[name].copy_(tensors[f"step/{name}"])
            for kind in STATE_NAMES:
                flat = torch.empty_strided(parameter.shape, parameter.stride()).copy_(tensors[f"{kind}/{name}"])
                for chunk in self.chunks[name]:
                    getattr(chunk, kind).copy_(_flat(flat)[chunk.start : chunk.stop])

    def device_tensors(self) -> Iterable[Tensor]:
        return [*self.slots, *self.steps.values()]

    def reset(self) -> None:
        self.armed, self.pending = False, None
        if self.stream is not None:
            self.stream.synchronize()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.stream is not None:  # a copy into a staging buffer must not outlive it
            self.stream.synchronize()

    def _grad_is_complete(self, parameter: Tensor, name: str) -> None:
        if self.armed:
            for group in _groups(self.chunks[name]):
                self._enqueue(group)

    def _enqueue(self, group: list[Chunk]) -> None:
        """Fetch a group's moments, and meanwhile update the group before it."""
        slot = self.slots[self.turn % len(self.slots)]
        self.turn += 1
        if len(self.slots) == 1:
            self._flush()
        with self._on_stream():
            for kind, chunk, view in _views(group, slot):
                view.copy_(getattr(chunk, kind), non_blocking=True)
        self._flush()
        self.pending = (group, slot)

    def _flush(self) -> None:
        """Update the pending group and send its moments home."""
        if self.pending is None:
            return
        group, slot = self.pending
        self.pending = None
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._apply(group, slot)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with self._on_stream():
            for kind, chunk, view in _views(group, slot):
                getattr(chunk, kind).copy_(view, non_blocking=True)
        for chunk in group:
            if self.hooks and chunk.stop == self.named[chunk.name].numel():
                self.named[chunk.name].grad = None

    def _apply(self, group: list[Chunk], slot: Tensor) -> None:
        staged: dict[int, dict[str, Tensor]] = {}
        for kind, chunk, view in _views(group, slot):
            staged.setdefault(id(chunk), {"step": self._step_before(chunk)})[kind] = view
        parameters = [_flat(self.named[chunk.name].detach())[chunk.start : chunk.stop] for chunk in group]
        grads = [
            _flat(_like(self.named[chunk.name].grad, self.named[chunk.name]))[chunk.start : chunk.stop]
            for chunk in group
        ]
        names = [chunk.name for chunk in group]
        self.arithmetic.update(names, parameters, grads, [staged[id(chunk)] for chunk in group], self.found_inf)

    def _step_before(self, chunk: Chunk) -> Tensor:
        """The weight's step counter as AdamW is to find it; later chunks of a weight get a copy that is thrown away."""
        return self.steps[chunk.name] if chunk.start == 0 else self.steps[chunk.name] - 1

    def _gathered(self, name: str, kind: str) -> Tensor:
        parameter = self.named[name]
        with host_memory():
            whole = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype)
            for chunk in self.chunks[name]:
                _flat(whole)[chunk.start : chunk.stop] = getattr(chunk, kind)
        return whole

    def _on_stream(self) -> AbstractContextManager[object]:
        return host_memory() if self.stream is None else torch.cuda.stream(self.stream)


def staging_sizes(named: dict[str, Any]) -> list[int]:
    """Elements of the staging buffers of the host placements: two of at most `STAGING_BYTES`, one for a tiny model."""
    total = sum(2 * p.numel() for p in named.values())
    size = STAGING_BYTES // 4
    return [total] if total <= size else [size, size]


def _chunks(named: Named, pinned: bool) -> dict[str, list[Chunk]]:
    """The moments of every weight, carved out of host buffers of `ARENA_ELEMENTS`; pinned memory is handed out in powers of two."""
    chunks: dict[str, list[Chunk]] = {}
    arena, used = torch.empty(0), 0
    for name, parameter in named.items():
        chunks[name] = []
        for start in range(0, parameter.numel(), CHUNK_ELEMENTS):
            stop = min(start + CHUNK_ELEMENTS, parameter.numel())
            if used + 2 * (stop - start) > arena.numel():
                with host_memory():
                    arena, used = torch.zeros(ARENA_ELEMENTS, pin_memory=pinned), 0
            middle, end = used + stop - start, used + 2 * (stop - start)
            chunks[name].append(Chunk(name, start, stop, arena[used:middle], arena[middle:end]))
            used = end
    return chunks


def _groups(chunks: list[Chunk]) -> list[list[Chunk]]:
    """Chunks in order, together as far as a staging buffer holds their moments."""
    groups: list[list[Chunk]] = []
    filled = STAGING_BYTES
    for chunk in chunks:
        if filled + 8 * chunk.size > STAGING_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(chunk)
        filled += 8 * chunk.size
    return groups


def _views(group: list[Chunk], slot: Tensor) -> Iterator[tuple[str, Chunk, Tensor]]:
    """(kind of moment, chunk, its place in the staging buffer)."""
    offset = 0
    for chunk in group:
        for kind in STATE_NAMES:
            yield kind, chunk, slot[offset : offset + chunk.size]
            offset += chunk.size


def _flat(dense: Tensor) -> Tensor:
    """All elements of a dense tensor in memory order."""
    return dense.as_strided((dense.numel(),), (1,))


def _like(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """The gradient in the weight's layout."""
    assert grad is not None
    if grad.stride() == parameter.stride():
        return grad
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _found_inf(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """1.0 on the device where a gradient is not finite, 0.0 otherwise; the kernel reads it, so that the host need not wait for it."""
    return next(iter(scaler._found_inf_per_device(optimizer).values()))
