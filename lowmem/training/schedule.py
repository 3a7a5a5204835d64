"""The learning rate, the best epoch and the early stop, as pure functions of what they are told.

Warm-up is linear over the first epochs, step by step. After it, under `plateau`, the rate is multiplied by `decay_factor` whenever
neither validation accuracy nor validation loss improved for `patience` epochs running, and a reset sets the rate at the start of its
epoch. Under `cosine` it falls to `min_lr`, step by step over the epochs that are left: timm's CosineLRScheduler with warmup_prefix.
Epochs count from 1, steps from 0. A metric that is not a finite number never improves anything.
"""

import math
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lowmem.recipe import Recipe, ScheduleRecipe

Count = Annotated[int, Field(ge=0)]


class ScheduleState(BaseModel):
    """All that the schedule remembers; a part of RunState."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lr: Annotated[float, Field(ge=0)]
    """Learning rate after warm-up, as decays and resets have left it; of a cosine, the highest."""
    best_accuracy: Annotated[float, Field(ge=0, le=1)] | None = None
    best_accuracy_loss: float | None = None
    """Validation loss of the epoch with the best accuracy, which settles a tie."""
    best_loss: float | None = None
    best_epoch: Count = 0
    """Epoch with the best accuracy; 0 before there is one."""
    epochs_without_decay: Count = 0
    """Epochs without improvement since the last improvement or decay."""
    epochs_without_improvement: Count = 0


def first_state(recipe: Recipe) -> ScheduleState:
    return ScheduleState(lr=recipe.optimizer.lr)


def learning_rate(state: ScheduleState, schedule: ScheduleRecipe, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The rate of one step."""
    if epoch <= schedule.warmup_epochs:
        progress = (epoch - 1) + (step + 1) / steps_per_epoch
        return state.lr * progress / schedule.warmup_epochs
    if schedule.kind == "cosine":
        num_steps = (schedule.epochs - schedule.warmup_epochs) * steps_per_epoch
        return cosine(
            state.lr, schedule.min_lr, (epoch - 1 - schedule.warmup_epochs) * steps_per_epoch + step, num_steps
        )
    return state.lr


def cosine(highest: float, lowest: float, step: int, num_steps: int) -> float:
    """From `highest` at step 0 towards `lowest` at step `num_steps`, and there from then on."""
    if step >= num_steps:
        return lowest
    return lowest + 0.5 * (highest - lowest) * (1 + math.cos(math.pi * step / num_steps))


def at_epoch_start(state: ScheduleState, schedule: ScheduleRecipe, epoch: int) -> ScheduleState:
    """The state with the reset of this epoch applied, if it has one."""
    for reset in schedule.resets:
        if reset.epoch == epoch:
            return state.model_copy(update={"lr": reset.lr, "epochs_without_decay": 0})
    return state


def after_epoch(
    state: ScheduleState, schedule: ScheduleRecipe, epoch: int, accuracy: float, loss: float
) -> ScheduleState:
    """The state after an epoch's validation."""
    best_epoch = is_best(state, accuracy, loss)
    better_accuracy = _above(accuracy, state.best_accuracy)
    better_loss = _above(-loss, None if state.best_loss is None else -state.best_loss)
    changes: dict[str, float | int] = {}
    if best_epoch:
        changes |= {"best_accuracy": accuracy, "best_accuracy_loss": loss, "best_epoch": epoch}
    if better_loss:
        changes |= {"best_loss": loss}
    if better_accuracy or better_loss:
        return state.model_copy(update={**changes, "epochs_without_decay": 0, "epochs_without_improvement": 0})
    changes["epochs_without_improvement"] = state.epochs_without_improvement + 1
    if epoch <= schedule.warmup_epochs or schedule.kind == "cosine":
        return state.model_copy(update=changes)
    stale = state.epochs_without_decay + 1
    if stale >= schedule.patience:
        changes |= {"lr": max(state.lr * schedule.decay_factor, min(schedule.min_lr, state.lr))}
        stale = 0
    return state.model_copy(update={**changes, "epochs_without_decay": stale})


def is_best(state: ScheduleState, accuracy: float, loss: float) -> bool:
    """Whether an epoch is the best so far: a higher accuracy, or the same with a lower loss."""
    if not (math.isfinite(accuracy) and math.isfinite(loss)):
        return False
    if state.best_accuracy is None or accuracy > state.best_accuracy:
        return True
    return accuracy == state.best_accuracy and loss < (
        math.inf if state.best_accuracy_loss is None else state.best_accuracy_loss
    )


def stops_early(state: ScheduleState, schedule: ScheduleRecipe) -> bool:
    return 0 < schedule.early_stopping <= state.epochs_without_improvement


def _above(value: float, best: float | None) -> bool:
    return math.isfinite(value) and (best is None or value > best)
