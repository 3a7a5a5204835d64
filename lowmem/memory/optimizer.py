"""Where AdamW's state lives and when it is applied: four placements, one arithmetic.

- `device`: torch's fused AdamW; the state (8 bytes a weight) stays on the device.
- `backward`: each weight is updated as soon as its gradient is complete, and the gradient is freed (LOMO's idea; here with the
  whole AdamW). Not with global clipping or a GradScaler, which need all gradients at once.
- `host`: the state lives in pinned host memory and is streamed through two small staging buffers on the device.
- `host_backward`: both; the copies hide behind the backward pass.

All of them run the same fused kernel on the same values, so weights and state end bitwise equal. Each weight has its own rates
(rates.py).
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lowmem.errors import LowmemError
from lowmem.memory.adamw import AdamW, Named, copy_state, fresh_state
from lowmem.memory.host_optimizer import HostOptimizer
from lowmem.memory.rates import rates_by_name
from lowmem.recipe import OptimizerRecipe


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
    arithmetic = AdamW(recipe, rates_by_name(model, recipe))
    if placement == "backward":
        return BackwardOptimizer(named, arithmetic)
    if placement in ("host", "host_backward"):
        return HostOptimizer(named, arithmetic, device, in_backward=placement == "host_backward")
    return DeviceOptimizer(named, arithmetic)


class DeviceOptimizer:
    def __init__(self, named: Named, arithmetic: AdamW) -> None:
        self.named, recipe = named, arithmetic.recipe
        self.optimizer = torch.optim.AdamW(
            arithmetic.groups(named), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True
        )
        for parameter in named.values():
            self.optimizer.state[parameter] = fresh_state(parameter)

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
            group["lr"] = lr * group["lr_scale"]

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}/{name}": value for name, p in self.named.items() for kind, value in self.optimizer.state[p].items()
        }

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state_tensors().items()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        copy_state(self.state_tensors(), tensors)

    def device_tensors(self) -> Iterable[Tensor]:
        return self.state_tensors().values()

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


class BackwardOptimizer:
    def __init__(self, named: Named, arithmetic: AdamW) -> None:
        self.named, self.arithmetic = named, arithmetic
        self.state = {name: fresh_state(parameter) for name, parameter in named.items()}
        self.armed = False
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._grad_is_complete, name=name))
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
                self.arithmetic.update([name], [parameter], [parameter.grad], [self.state[name]])
                parameter.grad = None

    def set_lr(self, lr: float) -> None:
        self.arithmetic.lr = lr

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{kind}/{name}": value for name, state in self.state.items() for kind, value in state.items()}

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.state_tensors().items()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        copy_state(self.state_tensors(), tensors)

    def device_tensors(self) -> Iterable[Tensor]:
        return self.state_tensors().values()

    def reset(self) -> None:
        self.armed = False

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _grad_is_complete(self, parameter: Tensor, name: str) -> None:
        if self.armed:
            self.arithmetic.update([name], [parameter], [parameter.grad], [self.state[name]])
            parameter.grad = None
