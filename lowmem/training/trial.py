"""Some real steps of a plan on its device with each way of running its blocks, to choose between them."""

import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory.batchnorm import has_live_batchnorm
from lowmem.memory.dropout import draws_random_numbers
from lowmem.planning.execution import Trial
from lowmem.planning.plan import Compiled, Plan
from lowmem.recipe import Recipe
from lowmem.training.engine import Engine, OutOfBudgetError

WARMUPS, STEPS = 3, 5
NORM = Normalisation((0.5,) * 3, (0.5,) * 3)


def ways_to_try(model: nn.Module, recipe: Recipe) -> tuple[Compiled, ...]:
    """Random masks come from a mode that compiled code does not see, and a batch norm whose momentum differs between the parts of a
    step would be compiled for each: such networks run as they are."""
    if draws_random_numbers(model) or (recipe.batch.num_atoms > 1 and has_live_batchnorm(model)):
        return ("none",)
    return ("none", "blocks", "graphs")


def try_execution(
    model: nn.Module, recipe: Recipe, plan: Plan, num_classes: int, ways: Sequence[Compiled]
) -> list[Trial]:
    """A trial for each way, on copies of the model; compiling may take a minute."""
    batches = random_batches(recipe, num_classes, 2)
    return [_trial(model, recipe, plan.model_copy(update={"compiled": way}), num_classes, batches) for way in ways]


def _trial(model: nn.Module, recipe: Recipe, plan: Plan, num_classes: int, batches: list[HostBatch]) -> Trial:
    engine = None
    try:
        engine = Engine(copy.deepcopy(model), recipe, plan, torch.ones(num_classes, dtype=torch.int64))
        seconds = _step_seconds(engine, recipe, plan, batches)
        return Trial(plan.compiled, seconds, engine.enforcement.peak_bytes)
    except OutOfBudgetError:
        return Trial(plan.compiled, failure="does not fit")
    except Exception as error:  # whatever a compiler and its back ends raise where they are not at home
        if plan.compiled == "none":
            raise
        return Trial(plan.compiled, failure=f"not available ({str(error).strip().splitlines()[0][:100]})")
    finally:
        if engine is not None:
            engine.close()


def _step_seconds(engine: Engine, recipe: Recipe, plan: Plan, batches: list[HostBatch]) -> float:
    """Median of single steps; the peak is that of the steps after the first ones, in which compilers work."""
    device_input = DeviceInput(NORM, engine.device, plan.memory_format, recipe.mixup, recipe.seed)
    seconds = []
    for number in range(WARMUPS + STEPS):
        if number == WARMUPS:
            engine.enforcement.reset_peak()
        started = time.perf_counter()
        engine.train_step(batches[number % len(batches)], device_input, 1, number, recipe.optimizer.lr).item()
        seconds.append(time.perf_counter() - started)
    return median(seconds[WARMUPS:])
