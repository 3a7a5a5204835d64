"""Run: the objects of one training run, and the changes that happen to them between steps."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

from lowmem.data.device_input import DeviceInput
from lowmem.data.folder import Dataset
from lowmem.data.loader import Loader
from lowmem.errors import LowmemError
from lowmem.memory.pressure import PressureWatch
from lowmem.planning.execution import keep_kernels
from lowmem.planning.plan import Plan
from lowmem.planning.planner import leaner_plan
from lowmem.progress import Progress
from lowmem.recipe import Recipe
from lowmem.results.classifier import ClassifierInfo
from lowmem.training.checkpoint import Checkpoint
from lowmem.training.engine import Engine, OutOfBudgetError
from lowmem.training.folder import RunFolder
from lowmem.training.interrupt import StopRequest
from lowmem.training.saving import Saver, not_finite_text
from lowmem.training.self_profile import SelfProfile
from lowmem.training.state import RunState

SHOW_EVERY_S = 0.25
DRAW_EVERY_S = 60.0


@dataclass
class EpochClock:
    """Where the seconds of an epoch went."""

    started: float = field(default_factory=time.perf_counter)
    first_step: int = 0
    wait_data_s: float = 0.0
    train_s: float = 0.0


@dataclass
class Run:
    """What the loop works on. Only `state`, `plan` and the clock change."""

    folder: RunFolder
    recipe: Recipe
    plan: Plan
    dataset: Dataset
    engine: Engine
    train_loader: Loader
    val_loader: Loader
    device_input: DeviceInput
    classifier_info: ClassifierInfo
    progress: Progress
    state: RunState
    stop: StopRequest
    saver: Saver
    pressure: PressureWatch
    profile: SelfProfile
    steps_per_epoch: int
    checkpoint_every_s: float = 600.0
    checkpoint_every_steps: int = 0
    clock: EpochClock = field(default_factory=EpochClock)
    _shown: float = 0.0
    _drawn: float = field(default_factory=time.monotonic)
    _saved_at_step: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def change(self, **changes: Any) -> None:
        self.state = self.state.model_copy(update=changes)

    def begin_epoch(self) -> None:
        self.clock = EpochClock(first_step=self.state.step)
        self.pressure.pause()
        self.progress.begin_epoch(self.state.epoch)
        self.engine.training_mode()
        self.engine.enforcement.reset_peak()

    def show_step(self, loss: float | None, lr: float) -> None:
        """Tell the display, a few times a second; raises LowmemError when the loss is no longer a number."""
        if loss is not None and not math.isfinite(loss):
            raise self.not_finite(loss, self.state.step)
        now = time.perf_counter()
        if now - self._shown < SHOW_EVERY_S and self.state.step < self.steps_per_epoch:
            return
        self._shown = now
        images = (self.state.step - self.clock.first_step) * self.recipe.batch.size
        self.progress.step(
            self.state.step, loss, lr, images / (now - self.clock.started), self.engine.enforcement.peak_bytes
        )

    def not_finite(self, loss: float, step: int) -> LowmemError:
        return LowmemError(not_finite_text(f"The loss ({loss})", step, self.state.epoch))

    def checkpoint_is_due(self) -> bool:
        """Whether a save is due and the last one is on the disk; raises the error of the last one."""
        if self.saver.busy:
            return False
        self.saver.check()
        if self.checkpoint_every_steps:
            return self.state.step - self._saved_at_step >= self.checkpoint_every_steps
        return time.monotonic() - self._saved >= self.checkpoint_every_s

    def figures_are_due(self) -> bool:
        """Drawing takes about a second, so short epochs share one."""
        due = time.monotonic() - self._drawn >= DRAW_EVERY_S
        if due:
            self._drawn = time.monotonic()
        return due

    def checkpoint_saved(self) -> None:
        self._saved, self._saved_at_step = time.monotonic(), self.state.step

    def state_now(self) -> RunState:
        """The state for a checkpoint."""
        return self.state.model_copy(update={"scaler": self.engine.scaler_state()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint stands; raises LowmemError where it is of another model."""
        if checkpoint.state.step > self.steps_per_epoch:
            raise LowmemError(
                f"step: the checkpoint has done {checkpoint.state.step} steps of an epoch of {self.steps_per_epoch}."
            )
        self.engine.load_tensors(checkpoint.model, checkpoint.optimizer)
        self.engine.load_scaler_state(checkpoint.state.scaler)
        self.state = checkpoint.state
        self._saved_at_step = self.state.step

    def use_leaner_plan(self, error: OutOfBudgetError) -> None:
        """Go on under the next leaner plan; raises LowmemError where there is none."""
        where = f"step {self.state.step + 1} of epoch {self.state.epoch}"
        plan = leaner_plan(
            self.plan, self.recipe, num_classes=len(self.dataset.classes), num_train=len(self.dataset.train)
        )
        plan = keep_kernels(plan, self.plan)
        self.progress.warn(
            f"Out of memory in {where}; nothing is lost. The run goes on under a leaner plan: {plan.reasons[0]}"
        )
        self.folder.record("leaner_plan", epoch=self.state.epoch, step=self.state.step, error=str(error))
        self.plan = plan
        self.engine.adopt(plan)
        if not error.rolled_back:
            self.saver.wait()
            self.restore(self.saver.checkpoints.newest()[1])
        self.folder.write_plan(plan)
