"""What benchmarks/gpu.py measures of lowmem's own steps: memory and time of plans, in turn with the unconstrained run."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.errors import LowmemError
from lowmem.planning.devices import device_spec
from lowmem.planning.plan import Plan
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe
from lowmem.training.engine import Engine, OutOfBudgetError
from lowmem.training.model import initialised_model
from lowmem.verification import reference_plan

NUM_CLASSES, NUM_TRAIN = 100, 20_700
NORM = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WARMUP_STEPS = 2
CONTEXT_BYTES = 600 * 2**20
"""Left free by the ballast beside the budget, for the context of this process."""
BALLAST = (
    "import sys, torch\nx = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda')\n"
    "torch.cuda.synchronize()\nprint('ready', flush=True)\nsys.stdin.read()"
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int = 3
    steps: int = 3


@dataclass
class Row:
    """One plan. Bytes; seconds per step as one figure per round."""

    model: str
    px: int
    budget_bytes: int
    held_down: bool = False
    """Whether the rest of the card was taken, so that cuDNN chose its workspaces as on a card of the budget's size."""
    policies: str = ""
    optimizer: str = ""
    exactness: str = ""
    predicted_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    process_bytes: int | None = None
    event_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    kernel_s: float | None = None
    reference_s: list[float] = field(default_factory=list)
    overhead: float | None = None
    error: str = ""


class Bench:
    """One model on one device, whose plan is exchanged as a run exchanges it."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
        self.batches = [_pinned(batch, device) for batch in random_batches(recipe, NUM_CLASSES, 2)]
        unconstrained = Plan(
            device=str(device), device_name="", amp_dtype=_amp(recipe, device), micro_batch=recipe.batch.atom
        )
        self.reference = reference_plan(unconstrained, recipe).model_copy(update={"cudnn_benchmark": True})
        self.engine = Engine(model, recipe, self.reference, torch.ones(NUM_CLASSES, dtype=torch.int64))
        self.number = 0

    def use(self, plan: Plan) -> None:
        """Run under this plan from now on, warmed up."""
        self.engine.adopt(plan)
        self.input = DeviceInput(NORM, self.device, plan.memory_format, self.recipe.mixup, self.recipe.seed)
        self.run(WARMUP_STEPS)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.number += 1
            batch = self.batches[self.number % 2]
            self.engine.train_step(batch, self.input, 1, self.number, self.recipe.optimizer.lr)

    def timed(self, num_steps: int) -> tuple[float, float]:
        """Seconds per step by the device's own events (on a CPU the wall clock) and by the wall clock."""
        started = time.perf_counter()
        if self.device.type != "cuda":
            self.run(num_steps)
            wall_s = (time.perf_counter() - started) / num_steps
            return wall_s, wall_s
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.run(num_steps)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / num_steps, (time.perf_counter() - started) / num_steps

    def kernel_seconds(self) -> float:
        """Seconds of a step in which the device works, without what launching costs."""
        from torch.profiler import ProfilerActivity, profile

        on_card = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
            self.run(1)
            if on_card:
                torch.cuda.synchronize()
        name = "self_device_time_total" if on_card else "self_cpu_time_total"
        return sum(getattr(event, name) for event in profiler.key_averages()) / 1e6

    def read_memory(self, row: Row) -> None:
        row.allocated_bytes = self.engine.enforcement.peak_bytes
        if self.device.type == "cuda":
            row.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            row.process_bytes = process_bytes(self.device)

    def close(self) -> None:
        self.engine.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def measured_rows(recipe: Recipe, device: torch.device, budgets: list[int], size: Size) -> list[dict[str, Any]]:
    """Each budget's plan and the unconstrained run in turn, in another order in each round."""
    plans, rows = _plans(recipe, device, budgets)
    bench, reference_s = Bench(recipe, device), []
    try:
        for number in range(size.rounds):
            for budget in random.Random(number).sample([0, *plans], len(plans) + 1):
                row = rows.get(budget)
                if row is not None and row.error:
                    continue
                with _noting_errors(row):
                    bench.use(plans.get(budget, bench.reference))
                    event_s, wall_s = bench.timed(size.steps)
                    if row is None:
                        reference_s.append(event_s)
                        continue
                    row.event_s.append(event_s)
                    row.wall_s.append(wall_s)
                    bench.read_memory(row)
                    row.kernel_s = bench.kernel_seconds() if number == size.rounds - 1 else None
    finally:
        bench.close()
    for row in rows.values():
        row.reference_s = reference_s
        if row.event_s and reference_s:
            row.overhead = median(row.event_s) / median(reference_s) - 1
    return [asdict(row) for row in rows.values()]


def memory_rows_of_small_cards(recipe: Recipe, device: torch.device, budgets: list[int]) -> list[dict[str, Any]]:
    """The memory of each plan while another process holds the rest of the card, as on a card of the budget's size."""
    plans, rows = _plans(recipe, device, budgets)
    for budget, plan in plans.items():
        row = rows[budget]
        row.held_down = True
        with _noting_errors(row), ballast(device, budget + CONTEXT_BYTES):
            bench = Bench(recipe, device)
            try:
                bench.use(plan)
                bench.run(2)
                bench.read_memory(row)
            finally:
                bench.close()
    return [asdict(row) for row in rows.values()]


@contextmanager
def ballast(device: torch.device, free_bytes: int) -> Iterator[None]:
    """Context: a child process holds all of the card but `free_bytes`; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    held = torch.cuda.mem_get_info(device)[0] - free_bytes - CONTEXT_BYTES
    if held <= 0:
        yield
        return
    command = [sys.executable, "-c", BALLAST, str(held)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError("the ballast could not be allocated")
        yield
    finally:
        child.kill()
        child.wait()


def process_bytes(device: torch.device) -> int | None:
    """What NVML says this process holds on the card; None where it does not say (WDDM, containers)."""
    from lowmem.memory.pressure import SystemReader

    return SystemReader(device)().own_card_bytes


def _plans(recipe: Recipe, device: torch.device, budgets: list[int]) -> tuple[dict[int, Plan], dict[int, Row]]:
    plans, rows, spec = {}, {}, device_spec(device)
    for budget in budgets:
        row = rows[budget] = Row(recipe.model.name, recipe.data.train_px, budget)
        with _noting_errors(row):
            plan = make_plan(recipe, spec, str(device), budget, num_classes=NUM_CLASSES, num_train=NUM_TRAIN)
            plans[budget] = plan
            kinds = [str(policy) for policy in plan.blocks.values()]
            row.policies = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "none"
            row.optimizer, row.exactness = plan.optimizer, plan.exactness
            row.predicted_bytes = plan.prediction.peak.total if plan.prediction else 0
    return plans, rows


@contextmanager
def _noting_errors(row: Row | None) -> Iterator[None]:
    try:
        yield
    except (LowmemError, OutOfBudgetError, RuntimeError) as error:
        if row is None:
            raise
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _amp(recipe: Recipe, device: torch.device) -> str:
    from lowmem.planning.devices import settle_amp

    return settle_amp(recipe.amp, device_spec(device))


def _pinned(batch: HostBatch, device: torch.device) -> HostBatch:
    if device.type != "cuda":
        return batch
    return HostBatch(batch.images_BHWC.pin_memory(), batch.labels_B.pin_memory(), batch.indices_B)
