"""Runs in this process that are stopped before a given step, as Ctrl-C would, and continued."""

import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.training import keeping
from lowmem.training.engine import Engine
from lowmem.training.resume import ResumeRequest, resume_run
from lowmem.training.start import TrainRequest, train_new_run
from tests.faults.harness import STEPS_PER_EPOCH, TINY, end_state, make_plan_file

EXIT_STOPPED = 130
EVERY_STEP = list(itertools.product((1, 2, 3), range(STEPS_PER_EPOCH)))
ATOMS = {1: (), 4: ("batch.norm_batch=2",)}
"""Overrides by accumulation steps."""
WHOLE: dict[Any, Any] = {}


@contextmanager
def hook_steps(before_step: Callable[[Engine, int, int], None]) -> Iterator[None]:
    """Context: `before_step(engine, epoch, step)` is called before every training step. Figures are not drawn."""
    step, draw = Engine.train_step, keeping.draw_figures

    def hooked(self: Engine, batch: Any, device_input: Any, epoch: int, step_number: int, lr: float) -> Any:
        before_step(self, epoch, step_number)
        return step(self, batch, device_input, epoch, step_number, lr)

    Engine.train_step, keeping.draw_figures = hooked, lambda run: None  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        Engine.train_step, keeping.draw_figures = step, draw  # type: ignore[method-assign]


@dataclass
class TinyRun:
    """The tiny recipe in a folder; each call returns the exit code."""

    photos: Path
    plan: Path
    out: Path
    overrides: tuple[str, ...] = ()

    def train(self, stop_in: tuple[int, int] | None = None, every: str = "10m", seen: list | None = None) -> int:
        """Train; a SIGINT arrives in the step `stop_in` (epoch, step). `seen` collects (epoch, step)."""
        request = TrainRequest(
            recipe="quickstart",
            data=self.photos,
            device="cpu",
            out=self.out,
            overrides=(*TINY, *self.overrides),
            plan_file=self.plan,
            checkpoint_every=every,
        )
        with hook_steps(_interrupting(stop_in, seen)):
            return train_new_run(request)

    def resume(
        self, stop_in: tuple[int, int] | None = None, *overrides: str, vram: str | None = None, seen: list | None = None
    ) -> int:
        with hook_steps(_interrupting(stop_in, seen)):
            return resume_run(ResumeRequest(self.out, vram=vram, overrides=overrides))

    def end(self) -> dict[str, Any]:
        return end_state(self.out)


def tiny(photos: Path, folder: Path, name: str = "run", workers: int = 0, atoms: int = 1, *more: str) -> TinyRun:
    """The tiny recipe in folder/name, with that many loader workers and accumulation steps."""
    plan = make_plan_file(folder / f"{name}.json", workers, micro_batch=8 // atoms)
    return TinyRun(photos, plan, folder / name, (*ATOMS[atoms], *more))


def whole(photos: Path, folder: Path, atoms: int = 1, *more: str) -> dict[str, Any]:
    """The end of the run in one go, without loader workers; trained once."""
    key = (photos, atoms, more)
    if key not in WHOLE:
        run = tiny(photos, folder, "whole", 0, atoms, *more)
        assert run.train() == 0
        WHOLE[key] = run.end()
    return WHOLE[key]


def _interrupting(stop_in: tuple[int, int] | None, seen: list | None) -> Callable[[Engine, int, int], None]:
    def before_step(engine: Engine, epoch: int, step: int) -> None:
        if seen is not None:
            seen.append((epoch, step))
        if (epoch, step) == stop_in:
            signal.raise_signal(signal.SIGINT)

    return before_step
