"""F9: a NaN or an infinity put into a run at a given step, where a fault could put it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowmem.training.engine import Engine

Inject = Callable[[Engine, float], None]


def into_weight(engine: Engine, value: float) -> None:
    with torch.no_grad():
        next(engine.model.parameters())[0, 0, 0, 0] = value


def into_statistic(engine: Engine, value: float) -> None:
    norm = next(m for m in engine.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = value


def into_gradient(engine: Engine, value: float) -> None:
    parameter = next(engine.model.parameters())
    handle: Any = None

    def poison(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        poisoned = grad.clone()
        poisoned[0, 0, 0, 0] = value
        return poisoned

    handle = parameter.register_hook(poison)


def into_loss(engine: Engine, value: float) -> None:
    objective, total = engine.objective, engine.objective.loss_sum

    def poisoned(*args: Any) -> torch.Tensor:
        objective.loss_sum = total  # type: ignore[method-assign]
        return total(*args) * value

    objective.loss_sum = poisoned  # type: ignore[method-assign]


def into_optimizer(engine: Engine, value: float) -> None:
    name = next(name for name, _ in engine.model.named_parameters())
    engine.optimizer.state_tensors()[f"exp_avg_sq/{name}"][0, 0, 0, 0] = value


INJECTIONS: dict[str, Inject] = {
    "loss": into_loss,
    "gradient": into_gradient,
    "weight": into_weight,
    "statistic": into_statistic,
    "optimizer": into_optimizer,
}


@contextmanager
def at_step(inject: Inject, value: float, epoch: int, step: int) -> Iterator[None]:
    """Context: the fault strikes once, before that step."""
    train_step, struck = Engine.train_step, []

    def hooked(self: Engine, batch: Any, device_input: Any, in_epoch: int, in_step: int, lr: float) -> Any:
        if (in_epoch, in_step) == (epoch, step) and not struck:
            struck.append(True)
            inject(self, value)
        return train_step(self, batch, device_input, in_epoch, in_step, lr)

    Engine.train_step = hooked  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine.train_step = train_step  # type: ignore[method-assign]
    assert struck, "the fault was never injected"


@contextmanager
def in_metric(value: float, epoch: int) -> Iterator[None]:
    """Context: the validation loss of one epoch is that value."""
    from lowmem.training import loop

    validate = loop.validate

    def poisoned(run: Any) -> Any:
        found = validate(run)
        return found.model_copy(update={"loss": value}) if run.state.epoch == epoch else found

    loop.validate = poisoned
    try:
        yield
    finally:
        loop.validate = validate
