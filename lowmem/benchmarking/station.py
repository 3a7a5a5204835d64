"""One plan on its device, ready to take steps that are timed.

The engine, the step and, with images, the loader are those of a training run, so what is measured is what a run costs. On the CPU,
where a budget is enforced by counting the first steps of each kind, those are over before the first timed one.
"""

import gc
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count, cycle, islice

import torch

from lowmem.benchmarking.result import Memory, Round
from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.data.split import Split
from lowmem.data.synthetic import random_batches
from lowmem.memory.limit import NUM_COUNTED
from lowmem.nvml import card_bytes, card_joules, open_card
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model

ROUND_S = 1.0
"""A round lasts about this long, so that the clock and one odd step weigh little."""
MOST_STEPS = 100
NUM_SYNTHETIC = 2
EPOCH = 1


@dataclass(frozen=True)
class Work:
    """What every device and budget is given to do; `split` None means synthetic images."""

    recipe: Recipe
    num_classes: int
    split: Split | None = None


class OutOfTimeError(Exception):
    """The deadline came before the first round could begin."""


class Station:
    """Context: a plan on its device. Raises OutOfBudgetError where it does not fit.

    No step begins after `deadline`, a time of `time.monotonic`: what is not warm by then raises OutOfTimeError, and a round ends early.
    """

    def __init__(self, work: Work, plan: Plan, deadline: float = math.inf) -> None:
        self.deadline = deadline
        if plan.loader.torch_threads:
            torch.set_num_threads(plan.loader.torch_threads)
        recipe = work.recipe.model_copy(update={"amp": plan.amp_dtype})
        self.recipe, self.num_classes, self.split, self.plan = recipe, work.num_classes, work.split, plan
        model, _ = initialised_model(recipe.model, work.num_classes, recipe.seed)
        self.engine = Engine(model, recipe, plan, torch.ones(work.num_classes, dtype=torch.int64))
        norm = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.input = DeviceInput(norm, self.engine.device, plan.memory_format, recipe.mixup, recipe.seed)
        self.card = open_card(self.engine.device)
        self.stack = ExitStack()
        self.batches = self._batches()
        self.step_numbers = count()
        self.num_steps = 0

    def __enter__(self) -> "Station":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.stack.close()
        self.engine.close()
        gc.collect()

    def warm_up(self) -> None:
        """Steps until counting, autotuning and caches have settled; decides how many steps a round has."""
        self.engine.enforcement.reset_peak()
        for number in self._warm_up_steps():
            self._check_time()
            self._train(next(self.batches), number)
        self._check_time()
        self._synchronise()
        started = time.perf_counter()
        self._train(next(self.batches), next(self.step_numbers))
        self._synchronise()
        self.num_steps = max(1, min(MOST_STEPS, round(ROUND_S / (time.perf_counter() - started))))

    def run_in(self, num_steps: int) -> None:
        """Steps that are not timed."""
        for _ in range(num_steps):
            self._check_time()
            self._train(next(self.batches), next(self.step_numbers))

    def measure(self) -> Round:
        """One round of at least one step."""
        self._check_time()
        num_steps, waited_s, joules = 0, 0.0, card_joules(self.card)
        self._synchronise()
        started = time.perf_counter()
        while num_steps < self.num_steps and (not num_steps or time.monotonic() < self.deadline):
            asked = time.perf_counter()
            batch = next(self.batches)
            waited_s += time.perf_counter() - asked
            self._train(batch, next(self.step_numbers))
            num_steps += 1
        self._synchronise()
        seconds = time.perf_counter() - started
        used = None if joules is None else (card_joules(self.card) or joules) - joules
        return Round(num_steps=num_steps, seconds=seconds, wait_data_s=waited_s, joules=used or None)

    def memory(self) -> Memory:
        """The most that was in use since the station was opened."""
        peak = self.engine.enforcement.peak_bytes
        if self.engine.device.type != "cuda":
            return Memory(peak_bytes=peak)
        reserved = torch.cuda.max_memory_reserved(self.engine.device)
        return Memory(peak_bytes=peak, reserved_bytes=reserved, process_bytes=card_bytes(self.card)[2])

    def _warm_up_steps(self) -> list[int]:
        """Numbers of the first steps of each kind that the recipe has, mixed and not."""
        prob = self.recipe.mixup.prob
        kinds = [kind for kind, happens in ((False, prob < 1), (True, prob > 0)) if happens]
        of_kind = ((n for n in count() if self.input.is_mixed(EPOCH, n) == kind) for kind in kinds)
        return [number for numbers in of_kind for number in islice(numbers, NUM_COUNTED)]

    def _train(self, batch: HostBatch, number: int) -> None:
        self.engine.train_step(batch, self.input, EPOCH, number, self.recipe.optimizer.lr)

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def _synchronise(self) -> None:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)

    def _batches(self) -> Iterator[HostBatch]:
        """Batches without end: two of noise in turn, or epoch after epoch of the images."""
        recipe, split = self.recipe, self.split
        if split is None:
            return cycle(random_batches(recipe, self.num_classes, NUM_SYNTHETIC))
        pixels = TrainPixels(split, recipe.augment, recipe.data.train_px, recipe.seed)
        loader = Loader(split, pixels, recipe.data.train_px, recipe.batch.size, self.plan.loader, recipe.seed)
        self.stack.enter_context(loader)
        epochs = (loader.batches(epoch) for epoch in count(1))
        return chain.from_iterable(epochs)
