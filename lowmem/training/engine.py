"""Engine: the recipe's model under a plan, on its device.

The plan can be exchanged between two steps: weights, statistics, their average (where the recipe has one) and optimiser state carry
over. A step that runs out of
memory leaves everything as it was before it, unless the plan updates weights during the backward pass; then the last
checkpoint has to be restored.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput
from lowmem.errors import LowmemError
from lowmem.memory.activations import apply_policies
from lowmem.memory.batchnorm import StatisticsBackup
from lowmem.memory.compilation import apply_compilation
from lowmem.memory.layout import apply_layouts
from lowmem.memory.limit import enforce, is_out_of_memory, recover
from lowmem.memory.optimizer import place_optimizer
from lowmem.phases import phase
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe
from lowmem.training.ema import Ema, is_ema
from lowmem.training.model import freeze_batchnorm
from lowmem.training.objective import Objective
from lowmem.training.step import TrainStep


class OutOfBudgetError(Exception):
    """A step or an evaluation did not fit into the plan's budget; `rolled_back` says whether the state is intact."""

    def __init__(self, message: str, rolled_back: bool) -> None:
        super().__init__(message)
        self.rolled_back = rolled_back


class Engine:
    """Weights, statistics, their average, optimiser and the step that changes them.

    `class_counts_K`: images of each class in the training set, int64 [K].
    """

    def __init__(self, model: nn.Module, recipe: Recipe, plan: Plan, class_counts_K: Tensor) -> None:
        self.recipe = recipe
        self.model = model
        self.device = torch.device(plan.device)
        self.objective = Objective(recipe.loss, class_counts_K, self.device)
        self.ema = None if recipe.ema.decay is None else Ema(model.to(self.device), recipe.ema)
        self._use(plan)

    @property
    def evaluated_model(self) -> nn.Module:
        """The classifier that the run gives as it stands: the average where the recipe has one, or the model itself."""
        return self.model if self.ema is None else self.ema.model

    def train_step(self, batch: HostBatch, device_input: DeviceInput, epoch: int, step: int, lr: float) -> Tensor:
        """One optimiser step on a batch of the recipe's size; returns its loss on the device, float32 scalar."""
        self.optimizer.set_lr(lr)
        self.backup.take()
        self.step.has_begun_update = False
        problem = ""
        try:
            with phase("step"):
                return self._watched_step(batch, device_input, epoch, step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        # Past the handler, so that no traceback holds the tensors of the failed step.
        self._take_back()
        raise OutOfBudgetError(problem, rolled_back=not self.step.has_begun_update)

    def training_mode(self) -> None:
        self.model.train()
        if self.recipe.model.freeze_batchnorm:
            freeze_batchnorm(self.model)

    def adopt(self, plan: Plan) -> None:
        """Go on under another plan."""
        optimizer_state = {name: tensor.cpu() for name, tensor in self.optimizer.state_tensors().items()}
        scaler_state = self.scaler_state()
        self._dismantle()
        self._use(plan)
        self.optimizer.load_state_tensors(optimizer_state)
        self.load_scaler_state(scaler_state)

    def model_tensors(self) -> dict[str, Tensor]:
        """Weights and statistics by timm's names, contiguous copies on the CPU."""
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.model.state_dict().items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """State of the optimizer and of the average, contiguous copies on the CPU."""
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.iter_optimizer_state()}

    def iter_optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """The same tensors as they are, one by one."""
        yield from self.optimizer.iter_state()
        if self.ema is not None:
            yield from self.ema.iter_state()

    def load_tensors(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Take over weights, statistics and optimizer state, the average's with it; raises LowmemError naming the first tensor that
        does not fit."""
        _check_layout(self.model.state_dict().items(), model)
        _check_layout(self.iter_optimizer_state(), optimizer)
        self.model.load_state_dict(model)
        self.optimizer.load_state_tensors({name: t for name, t in optimizer.items() if not is_ema(name)})
        if self.ema is not None:
            self.ema.load_state(optimizer)

    def scaler_state(self) -> dict[str, float | int] | None:
        return None if self.step.scaler is None else self.step.scaler.state_dict()

    def load_scaler_state(self, state: dict[str, float | int] | None) -> None:
        if self.step.scaler is not None and state:
            self.step.scaler.load_state_dict(state)

    def close(self) -> None:
        self._dismantle()

    def _use(self, plan: Plan) -> None:
        self.plan = plan
        torch.backends.cudnn.benchmark = plan.cudnn_benchmark
        memory_format = torch.channels_last if plan.memory_format == "channels_last" else torch.contiguous_format
        self.model.to(device=self.device, memory_format=memory_format)
        if self.ema is not None:
            self.ema.model.to(memory_format=memory_format)
        self.training_mode()
        self.layouts = apply_layouts(self.model, plan.layouts)
        self.compilation = apply_compilation(self.model, plan)
        self.policies = apply_policies(self.model, plan.blocks)
        self.optimizer = place_optimizer(self.model, self.recipe.optimizer, plan.optimizer, self.device)
        self.step = TrainStep(self.model, self.recipe, plan, self.objective, self.optimizer, self.policies)
        self.enforcement = enforce(self.device, plan.budget, self.resident)
        self.backup = StatisticsBackup(self.model)

    def _watched_step(self, batch: HostBatch, device_input: DeviceInput, epoch: int, step: int) -> Tensor:
        with self.enforcement.watch("training, mixed" if device_input.is_mixed(epoch, step) else "training"):
            with phase("copy"):
                prepared = device_input.prepare(batch, epoch, step)
            self.compilation.begin_step()
            loss = self.step(prepared, epoch, step)
            if self.ema is not None:
                with phase("optimizer"):
                    self.ema.update(self.model)
            return loss

    def _take_back(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.policies.reset()
        self.optimizer.reset()
        self.step.statistics.end_step()
        recover()
        self.backup.restore()

    def resident(self) -> dict[str, list[Tensor]]:
        """What lives on the device between steps, by what it is for."""
        model, objective = self.model, self.objective
        return {
            "weights": [*model.parameters(), *model.buffers(), *self.backup.copies, objective.weights_K],
            "optimizer": list(self.optimizer.device_tensors()),
            "ema": [] if self.ema is None else list(self.ema.device_tensors()),
        }

    def _dismantle(self) -> None:
        self.policies.remove()
        self.compilation.remove()
        self.layouts.remove()
        self.optimizer.close()
        del self.optimizer, self.step, self.enforcement, self.backup
        recover()


def _check_layout(own: Iterable[tuple[str, Tensor]], given: dict[str, Tensor]) -> None:
    names = set()
    for name, tensor in own:
        names.add(name)
        found = given.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            what = "missing" if found is None else f"{list(found.shape)} {found.dtype}"
            raise LowmemError(
                f"The checkpoint is not of this model: {name} is {what} instead of {list(tensor.shape)} {tensor.dtype}."
            )
    if set(given) - names:
        raise LowmemError(f"The checkpoint is not of this model, which has no {min(set(given) - names)}.")
