"""Where AdamW's state lives and when it is applied: four placements, one arithmetic.

- `device`: torch's fused AdamW; the state (8 bytes a weight) stays on the device.
- `backward`: each weight is updated as soon as its gradient is complete, and the gradient is freed (LOMO's idea; here with the
  whole AdamW). Not with global clipping or a GradScaler, which need all gradients at once.
- `host`: the state lives in pinned host memory and is streamed through two small staging buffers on the device.
- `host_backward`: both; the copies hide behind the backward pass.

All of them run the same fused kernel on the same values, so weights and state end bitwise equal.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowmem.errors import LowmemError
from lowmem.memory.meter import host_memory
from lowmem.recipe import OptimizerRecipe
from lowmem.sizes import MIB

STAGING_BYTES = 32 * MIB
"""Per staging buffer of the host placements; there are two, so that copies and updates overlap."""
CHUNK_ELEMENTS = STAGING_BYTES // 8
"""A larger weight is updated in parts."""
ARENA_ELEMENTS = 16 * MIB
"""64 MiB of float32: pinned memory is handed out in powers of two (pytorch #95823)."""
STATE_NAMES = ("exp_avg", "exp_avg_sq")
Named = dict[str, nn.Parameter]


class PlacedOptimizer(Protocol):
    def arm(self) -> None:
        """Called before the backward pass of the last micro-batch of a step."""

    def update(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
        """Called after it: the weights are updated and no gradient is left when it returns."""

    def set_lr(self, lr: float) -> None: ...

    def state_tensors(self) -> dict[str, Tensor]:
        """The state by name: `exp_avg/WEIGHT`, `exp_avg_sq/WEIGHT`, `step/WEIGHT`."""

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one by one: a placement in chunks never gathers more than one."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None: ...

    def device_tensors(self) -> Iterable[Tensor]:
        """The state that takes up memory on the device."""

    def reset(self) -> None:
        """After a step that failed half-way."""

    def close(self) -> None:
        """Let go of the model."""


def place_optimizer(model: nn.Module, recipe: OptimizerRecipe, placement: str, device: torch.device) -> PlacedOptimizer:
    """AdamW over all trainable weights; the state is allocated here, so that it cannot run out of memory later."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if placement.endswith("backward") and recipe.clip_norm is not None:
        raise LowmemError(
            "The optimizer cannot run in the backward pass with optimizer.clip_norm, which needs all gradients at once."
        )
    if placement == "backward":
        return BackwardOptimizer(named, recipe)
    if placement in ("host", "host_backward"):
        return HostOptimizer(named, recipe, device, in_backward=placement == "host_backward")
    return DeviceOptimizer(named, recipe)


class DeviceOptimizer:
    def __init__(self, named: Named, recipe: OptimizerRecipe) -> None:
        self.named = named
        self.optimizer = torch.optim.AdamW(
            named.values(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        for parameter in named.values():
            self.optimizer.state[parameter] = _fresh_state(parameter)

    def arm(self) -> None:
        pass

    def update(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
        if clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.named.values(), clip_norm)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{name}": value for name, p in self.named.items() for kind, value in self.optimizer.state[p].items()
        }

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state_tensors().items()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        _copy_state(self.state_tensors(), tensors)

    def device_tensors(self) -> Iterable[Tensor]:
        return self.state_tensors().values()

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class BackwardOptimizer:
    def __init__(self, named: Named, recipe: OptimizerRecipe) -> None:
        self.named, self.lr, self.recipe = named, recipe.lr, recipe
        self.state = {name: _fresh_state(parameter) for name, parameter in named.items()}
        self.armed = False
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._grad_is_complete, state=self.state[name]))
            for name, parameter in named.items()
        ]

    def arm(self) -> None:
        self.armed = True

    def update(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
        if scaler is not None or clip_norm is not None:
            raise LowmemError(
                "The optimizer cannot run in the backward pass with gradient clipping or fp16: use another placement."
            )
        self.armed = False
        for name, parameter in self.named.items():  # gradients of earlier micro-batches that the last one did not reach
            if parameter.grad is not None:
                _update([parameter], [parameter.grad], [self.state[name]], self.recipe, self.lr)
                parameter.grad = None

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": value for name, state in self.state.items() for kind, value in state.items()}

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state_tensors().items()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        _copy_state(self.state_tensors(), tensors)

    def device_tensors(self) -> Iterable[Tensor]:
        return self.state_tensors().values()

    def reset(self) -> None:
        self.armed = False

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _grad_is_complete(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        if self.armed:
            _update([parameter], [parameter.grad], [state], self.recipe, self.lr)
            parameter.grad = None


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

    def __init__(self, named: Named, recipe: OptimizerRecipe, device: torch.device, in_backward: bool) -> None:
        self.named, self.lr, self.recipe, self.device = named, recipe.lr, recipe, device
        self.chunks = _chunks(named, pinned=device.type == "cuda")
        self.steps = {name: torch.zeros((), device=device) for name in named}
        self.slots = [torch.empty(num, device=device) for num in staging_sizes(named)]
        self.turn = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.armed = False
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
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), clip_norm)
        if not self.hooks and (scaler is None or not _found_inf(scaler, self.scratch)):
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
        self.lr = lr

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
        _check_names(self.state_tensors(), tensors)
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

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

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
        _update(parameters, grads, [staged[id(chunk)] for chunk in group], self.recipe, self.lr)

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


def _fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before the first step, in the layout of the weight."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    for kind in STATE_NAMES:
        state[kind] = torch.zeros_like(parameter, requires_grad=False)
    return state


def _update(
    parameters: list[Any], grads: list[Any], states: list[dict[str, Tensor]], recipe: OptimizerRecipe, lr: float
) -> None:
    if not parameters:
        return
    with torch.no_grad():
        adamw(
            parameters,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            lr=lr,
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            maximize=False,
        )


def _check_names(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    if set(own) != set(given):
        odd = sorted(set(own) ^ set(given))
        raise LowmemError(f"The optimizer's state does not fit the model: {odd[0]} and {len(odd) - 1} more.")


def _copy_state(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    _check_names(own, given)
    for name, tensor in own.items():
        tensor.copy_(given[name])


def _found_inf(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    found = scaler._found_inf_per_device(optimizer)
    return any(bool(value.item()) for value in found.values())
