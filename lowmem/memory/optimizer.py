"""Where AdamW's state lives and when it is applied: three placements, one arithmetic.

- `device`: torch's fused AdamW; the state (8 bytes a weight) stays on the device.
- `backward`: each weight is updated as soon as its gradient is complete, and the gradient is freed (LOMO's idea; here with the
  whole AdamW). Not with global clipping or a GradScaler, which need all gradients at once.
- `host`: the state lives in pinned host memory and is streamed through a small staging buffer on the device.

All three run the same fused kernel on the same values, so weights and state end bitwise equal.
"""

from collections.abc import Iterable
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
"""Per staging buffer of the `host` placement; there are two, so that copies and updates overlap."""
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
    if placement == "backward" and recipe.clip_norm is not None:
        raise LowmemError("The optimizer cannot run in the backward pass with optimizer.clip_norm, which needs all gradients at once.")
    if placement == "backward":
        return BackwardOptimizer(named, recipe)
    if placement == "host":
        return HostOptimizer(named, recipe, device)
    return DeviceOptimizer(named, recipe)


class DeviceOptimizer:
    def __init__(self, named: Named, recipe: OptimizerRecipe) -> None:
        self.named = named
        self.optimizer = torch.optim.AdamW(
            named.values(), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
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
        return {f"{kind}/{name}": value for name, p in self.named.items() for kind, value in self.optimizer.state[p].items()}

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
            raise LowmemError("The optimizer cannot run in the backward pass with gradient clipping or fp16: use another placement.")
        self.armed = False
        for name, parameter in self.named.items():  # gradients of earlier micro-batches that the last one did not reach
            if parameter.grad is not None:
                _update([parameter], [parameter.grad], [self.state[name]], self.recipe, self.lr)
                parameter.grad = None

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": value for name, state in self.state.items() for kind, value in state.items()}

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


class HostOptimizer:
    def __init__(self, named: Named, recipe: OptimizerRecipe, device: torch.device) -> None:
        self.named, self.lr, self.recipe, self.device = named, recipe.lr, recipe, device
        pinned = device.type == "cuda"
        with host_memory():
            self.host = {name: _fresh_state(p, "cpu", pinned) for name, p in named.items()}
        self.steps = {name: torch.zeros((), device=device) for name in named}
        self.groups = _groups(named, STAGING_BYTES)
        widest = max(sum(2 * named[name].nbytes for name in group) for group in self.groups)
        self.staging = [torch.empty(widest // 4, device=device) for _ in range(min(2, len(self.groups)))]
        self.stream = torch.cuda.Stream(device) if pinned else None
        self.scratch = torch.optim.SGD(named.values(), lr=0.0)
        """Only a handle by which a GradScaler finds the gradients."""

    def arm(self) -> None:
        pass

    def update(self, scaler: torch.amp.GradScaler | None, clip_norm: float | None) -> None:
        if scaler is not None:
            scaler.unscale_(self.scratch)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), clip_norm)
        if scaler is None or not _found_inf(scaler, self.scratch):
            self._update_all()
        if scaler is not None:
            scaler.update()
        for parameter in self.named.values():
            parameter.grad = None

    def set_lr(self, lr: float) -> None:
        self.lr = lr

    def state_tensors(self) -> dict[str, Tensor]:
        if self.stream is not None:
            self.stream.synchronize()
        moments = {f"{kind}/{name}": state[kind] for name, state in self.host.items() for kind in STATE_NAMES}
        return moments | {f"step/{name}": step for name, step in self.steps.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        _copy_state(self.state_tensors(), tensors)

    def device_tensors(self) -> Iterable[Tensor]:
        return [*self.staging, *self.steps.values()]

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _update_all(self) -> None:
        """Group by group through the staging buffers; the next group's state travels while this one is updated."""
        staged = self._fetch(0)
        for index in range(len(self.groups)):
            following = self._fetch(index + 1) if index + 1 < len(self.groups) else None
            self._apply(index, staged)
            staged = following

    def _fetch(self, index: int) -> dict[str, dict[str, Tensor]]:
        flat, offset, views = self.staging[index % len(self.staging)], 0, {}
        for name in self.groups[index]:
            parameter, views[name] = self.named[name], {"step": self.steps[name]}
            for kind in STATE_NAMES:
                size = parameter.numel()
                views[name][kind] = flat[offset : offset + size].as_strided(parameter.shape, parameter.stride(), flat.storage_offset() + offset)
                offset += size
        with self._on_stream():
            for name in self.groups[index]:
                for kind in STATE_NAMES:
                    views[name][kind].copy_(self.host[name][kind], non_blocking=True)
        return views

    def _apply(self, index: int, staged: dict[str, dict[str, Tensor]]) -> None:
        names = [name for name in self.groups[index] if self.named[name].grad is not None]
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        parameters = [self.named[name] for name in names]
        _update(parameters, [p.grad for p in parameters], [staged[name] for name in names], self.recipe, self.lr)
        with self._on_stream():
            for name in names:
                for kind in STATE_NAMES:
                    self.host[name][kind].copy_(staged[name][kind], non_blocking=True)

    def _on_stream(self) -> Any:
        """The side stream, after everything that the main stream was given so far."""
        if self.stream is None:
            return host_memory()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)


def _fresh_state(parameter: Tensor, device: Any = None, pinned: bool = False) -> dict[str, Tensor]:
    """AdamW's state before the first step, in the layout of the weight."""
    device = device or parameter.device
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for kind in STATE_NAMES:
        state[kind] = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device, pin_memory=pinned).zero_()
    return state


def _update(parameters: list[Any], grads: list[Any], states: list[dict[str, Tensor]], recipe: OptimizerRecipe, lr: float) -> None:
    if not parameters:
        return
    with torch.no_grad():
        adamw(
            parameters, grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states],
            fused=True, amsgrad=False, beta1=recipe.betas[0], beta2=recipe.betas[1], lr=lr,
            weight_decay=recipe.weight_decay, eps=recipe.eps, maximize=False,
        )


def _copy_state(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    if set(own) != set(given):
        odd = sorted(set(own) ^ set(given))
        raise LowmemError(f"The optimizer's state does not fit the model: {odd[0]} and {len(odd) - 1} more.")
    for name, tensor in own.items():
        tensor.copy_(given[name])


def _groups(named: Named, limit_bytes: int) -> list[list[str]]:
    """Weights in order, grouped so that both moments of a group fit into one staging buffer (or it is a single weight)."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, parameter in named.items():
        if groups[-1] and filled + 2 * parameter.nbytes > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += 2 * parameter.nbytes
    return groups


def _found_inf(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    found = scaler._found_inf_per_device(optimizer)
    return any(bool(value.item()) for value in found.values())
