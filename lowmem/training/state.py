"""RunState: all that must survive a crash beside the tensors, and a reader that takes nothing on trust."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowmem.errors import LowmemError
from lowmem.recipe import Recipe
from lowmem.training.schedule import ScheduleState

ScalerValue = Annotated[float | int, Field(ge=0)]


class RunState(BaseModel):
    """Where a run stands between two steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: Recipe
    """The recipe in force; recipe.toml is its copy for people."""
    epoch: Annotated[int, Field(ge=1)]
    """Epoch in progress, from 1; past the last one when the run is over."""
    step: Annotated[int, Field(ge=0)]
    """Steps of that epoch that are done."""
    losses: tuple[float, ...] = ()
    """The losses of those steps, as far as they were read; all of them in a checkpoint."""
    schedule: ScheduleState
    scaler: dict[str, ScalerValue] | None
    """State of the GradScaler, where there is one."""
    seed: Annotated[int, Field(ge=0)]
    dataset: Annotated[str, Field(min_length=1)]
    """Fingerprint of the data set."""
    finished: bool = False

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)


def state_from_json(text: bytes, source: str) -> RunState:
    """The state in a checkpoint's JSON; raises LowmemError naming the first field that is missing, wrong or does not fit the others."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LowmemError(f"{source}: is not JSON ({type(error).__name__}).") from None
    for model, part, prefix in ((RunState, tree, ""), (ScheduleState, _part(tree, "schedule"), "schedule.")):
        for name in model.model_fields:
            if isinstance(part, dict) and name not in part:
                raise LowmemError(f"{source}: {prefix}{name}: is missing.")
    try:
        state = RunState.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise LowmemError(f"{source}: {field}: {first['msg']}.") from None
    problem = _contradiction(state)
    if problem:
        raise LowmemError(f"{source}: {problem}")
    return state


def _part(tree: Any, name: str) -> Any:
    return tree.get(name) if isinstance(tree, dict) else None


def _contradiction(state: RunState) -> str:
    """What two fields disagree about; empty where all fit."""
    schedule, epochs = state.schedule, state.recipe.schedule.epochs
    if len(state.losses) != state.step:
        return f"losses: {len(state.losses)} of them for {state.step} steps."
    if state.seed != state.recipe.seed:
        return f"seed: {state.seed}, but the recipe has {state.recipe.seed}."
    if schedule.best_epoch >= state.epoch:
        return f"schedule.best_epoch: {schedule.best_epoch} is not over in epoch {state.epoch}."
    if (schedule.best_epoch == 0) != (schedule.best_accuracy is None):
        return f"schedule.best_accuracy: {schedule.best_accuracy} does not fit best_epoch {schedule.best_epoch}."
    if (schedule.best_accuracy is None) != (schedule.best_accuracy_loss is None):
        return f"schedule.best_accuracy_loss: {schedule.best_accuracy_loss} does not fit best_accuracy {schedule.best_accuracy}."
    if (schedule.best_accuracy is None) > (schedule.best_loss is None):
        return "schedule.best_loss: present before any epoch was a best one."
    if max(schedule.epochs_without_decay, schedule.epochs_without_improvement) >= state.epoch:
        return f"schedule.epochs_without_improvement: more than the {state.epoch - 1} epochs that are over."
    if state.finished and state.epoch <= epochs and not state.recipe.schedule.early_stopping:
        return f"finished: but epoch {state.epoch} of {epochs} is still to do."
    return ""
