"""One optimiser step: atoms, accumulation, scaler, update.

An atom is the images that share batch-norm statistics (the recipe's norm batch). A step runs `num_atoms` atoms; a plan
may also split an atom where no batch norm looks across its images. The loss is divided by the weight of the whole batch
before any backward, and every random mask depends on (seed, epoch, step, atom) alone, so the split does not show in the
result. The planner traces this very code on fake tensors.

Axes: B images, C channels, H W pixels, K classes.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.data.batch import DeviceBatch
from lowmem.errors import LowmemError
from lowmem.memory.activations import PolicyHandle
from lowmem.memory.batchnorm import AtomStatistics, has_live_batchnorm
from lowmem.memory.dropout import atom_masks, draws_random_numbers
from lowmem.memory.optimizer import PlacedOptimizer
from lowmem.phases import phase
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe
from lowmem.training.objective import Objective

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class MicroBatch:
    """Rows `start` to `stop` of the batch: the part `[start - first, stop - first)` of atom `atom`."""

    atom: int
    first: int
    start: int
    stop: int


def micro_batches(batch_size: int, atom_size: int, micro_batch: int) -> list[MicroBatch]:
    """The forward passes of a step, in order; a micro-batch never crosses an atom."""
    parts: list[MicroBatch] = []
    for atom, first in enumerate(range(0, batch_size, atom_size)):
        end = min(first + atom_size, batch_size)
        parts += [
            MicroBatch(atom, first, start, min(start + micro_batch, end)) for start in range(first, end, micro_batch)
        ]
    return parts


class TrainStep:
    """Callable: one step of the recipe under the plan. The gradients are gone when it returns.

    `model` is in training mode when the step is made.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        plan: Plan,
        objective: Objective,
        optimizer: PlacedOptimizer,
        policies: PolicyHandle,
    ) -> None:
        self.model, self.recipe, self.plan = model, recipe, plan
        self.objective, self.optimizer, self.policies = objective, optimizer, policies
        if plan.optimizer.endswith("backward") and plan.amp_dtype == "fp16":
            raise LowmemError(
                "The optimizer cannot run in the backward pass with fp16, whose scaler needs all gradients at once."
            )
        self.scaler = torch.amp.GradScaler(torch.device(plan.device).type) if plan.amp_dtype == "fp16" else None
        self.statistics = AtomStatistics(model, recipe.batch.num_atoms)
        self.parts = micro_batches(recipe.batch.size, recipe.batch.atom, plan.micro_batch)
        self.masks_by_row = draws_random_numbers(model) and not has_live_batchnorm(model)
        self.has_begun_update = False
        """Whether the running step may already have changed weights, so that it cannot be taken back."""

    def __call__(self, batch: DeviceBatch, epoch: int, step: int) -> Tensor:
        """Train on one whole batch; returns its loss, a float32 scalar on the device (no synchronisation)."""
        total_weight = self.objective.total_weight(batch.targets)
        loss = torch.zeros_like(total_weight)
        for part in self.parts:
            if part is self.parts[-1]:
                self.optimizer.arm()
            loss += self._forward_backward(batch, part, total_weight, epoch, step)
        self.statistics.end_step()
        # On the device all weights change in one kernel at the end, which needs no memory of its own.
        self.has_begun_update = self.plan.optimizer != "device"
        with phase("optimizer"):
            self.optimizer.update(self.scaler, self.recipe.optimizer.clip_norm)
        self.has_begun_update = True
        return loss

    def _forward_backward(
        self, batch: DeviceBatch, part: MicroBatch, total_weight: Tensor, epoch: int, step: int
    ) -> Tensor:
        self.statistics.begin_atom(part.atom)
        rows = slice(part.start - part.first, part.stop - part.first) if self.masks_by_row else None
        with atom_masks(self.recipe.seed, epoch, step, part.atom, rows, self.recipe.batch.atom):
            with phase("forward"):
                with autocast(self.plan):
                    logits_BK = self.model(batch.images_BCHW[part.start : part.stop])
                self.policies.end_forward()
                targets = batch.targets.rows(part.start, part.stop)
                loss = self.objective.loss_sum(logits_BK, targets) / total_weight
                del logits_BK
            self.has_begun_update = part is self.parts[-1] and self.plan.optimizer.endswith("backward")
            with phase("backward"):
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                self.policies.end_backward()
        return loss.detach()


def autocast(plan: Plan) -> AbstractContextManager[object]:
    """Autocast as the plan has it; does nothing for fp32."""
    dtype = AMP_DTYPES[plan.amp_dtype]
    if dtype is None:
        return nullcontext()
    return torch.autocast(torch.device(plan.device).type, dtype=dtype, cache_enabled=plan.autocast_cache)
