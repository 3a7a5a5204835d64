"""Everything in lowmem that needs a CUDA card, in one command of at most 10 minutes, with one JSON out.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json

It runs `pytest -m cuda`; then, for each model and budget: the plan's predicted peak beside the measured one (allocated, reserved, and the
process as NVML sees it), step time by CUDA events and by the wall clock, alternating with the unconstrained run; sameness under
deterministic algorithms; and the mixed step of the recipe. The budget is enforced by the allocator's limit; the card's settings stay as
they are. Exit code 0: ran; 1: something failed; 4: no CUDA card.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.planning.devices import device_spec
from lowmem.planning.plan import Plan
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import GIB, MIB, format_size
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.verification import random_batches, reference_plan, verify

NO_CARD = 4
NUM_CLASSES, NUM_TRAIN = 100, 20_700
BUDGETS_GIB = (16, 8, 6, 4, 3, 2)
CASES = (("seresnextaa101d_32x8d", 224), ("seresnextaa101d_32x8d", 288), ("resnet50", 224))
WARMUP_STEPS, TIMED_ROUNDS, STEPS_PER_ROUND = 3, 5, 2


@dataclass
class Row:
    """One model at one budget. Bytes; seconds per step as medians over the rounds, with their range."""

    model: str
    px: int
    budget_gib: float
    policies: str = ""
    optimizer: str = ""
    exactness: str = ""
    predicted_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    process_bytes: int | None = None
    event_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    reference_event_s: list[float] = field(default_factory=list)
    overhead: float | None = None
    error: str = ""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this")
    options.add_argument("--skip-tests", action="store_true")
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA card: nothing was run.")
        return NO_CARD
    prepare_allocator()
    deadline = time.monotonic() + 60 * chosen.minutes
    report: dict[str, Any] = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "machine": this_machine().model_dump(),
        "cudnn": torch.backends.cudnn.version(),
        "rounds": TIMED_ROUNDS,
        "steps_per_round": STEPS_PER_ROUND,
        "rows": [],
        "sameness": [],
    }
    if not chosen.skip_tests:
        report["tests"] = run_tests()
    for name, px in CASES:
        for budget_gib in BUDGETS_GIB:
            if time.monotonic() < deadline:
                report["rows"].append(asdict(measured(recipe_for(name, px), budget_gib)))
                save(report, chosen.out)
    for budget_gib in BUDGETS_GIB[1:]:
        if time.monotonic() < deadline:
            report["sameness"].append(sameness(recipe_for("resnet50", 224), budget_gib))
    save(report, chosen.out)
    print_summary(report)
    failed = any(row["error"] for row in report["rows"]) or report.get("tests", {}).get("exit_code", 0) not in (0, 5)
    return int(failed)


def recipe_for(name: str, px: int) -> Recipe:
    overrides = (f"model.name={name}", "model.weights=none", f"data.train_px={px}", "amp=bf16")
    return load_recipe("seresnextaa101d_32x8d", overrides)


def run_tests() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "cuda", "-q"], capture_output=True, text=True)
    return {"exit_code": done.returncode, "tail": done.stdout.splitlines()[-15:]}


def measured(recipe: Recipe, budget_gib: float) -> Row:
    """The plan for a budget, run beside the unconstrained one."""
    row = Row(recipe.model.name, recipe.data.train_px, budget_gib)
    device = torch.device("cuda:0")
    try:
        plan = make_plan(
            recipe,
            device_spec(device),
            str(device),
            int(budget_gib * GIB),
            num_classes=NUM_CLASSES,
            num_train=NUM_TRAIN,
        )
        describe(row, plan)
        row.event_s, row.wall_s = timed(recipe, plan, row)
        row.reference_event_s, _ = timed(recipe, reference_plan(plan, recipe).model_copy(update={"budget": None}), None)
        row.overhead = median(row.event_s) / median(row.reference_event_s) - 1
    except (LowmemError, RuntimeError) as error:
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def describe(row: Row, plan: Plan) -> None:
    kinds = [str(policy) for policy in plan.blocks.values()]
    row.policies = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))) or "none"
    row.optimizer, row.exactness = plan.optimizer, plan.exactness
    row.predicted_bytes = plan.prediction.peak.total if plan.prediction else 0


def timed(recipe: Recipe, plan: Plan, row: Row | None) -> tuple[list[float], list[float]]:
    """Seconds per step by CUDA events and by the wall clock, a figure per round; memory goes into `row`."""
    model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
    engine = Engine(model, recipe, plan, torch.ones(NUM_CLASSES, dtype=torch.int64))
    device_input = DeviceInput(
        Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        engine.device,
        plan.memory_format,
        recipe.mixup,
        recipe.seed,
    )
    batches = random_batches(recipe, NUM_CLASSES, 2)
    try:
        for step in range(WARMUP_STEPS):
            engine.train_step(batches[step % 2], device_input, 1, step, recipe.optimizer.lr)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        event_s, wall_s = [], []
        for round_number in range(TIMED_ROUNDS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began = time.perf_counter()
            start.record()
            for step in range(STEPS_PER_ROUND):
                engine.train_step(
                    batches[step % 2], device_input, 2, round_number * STEPS_PER_ROUND + step, recipe.optimizer.lr
                )
            end.record()
            torch.cuda.synchronize()
            wall_s.append((time.perf_counter() - began) / STEPS_PER_ROUND)
            event_s.append(start.elapsed_time(end) / 1000 / STEPS_PER_ROUND)
        if row is not None:
            row.allocated_bytes, row.reserved_bytes = (
                torch.cuda.max_memory_allocated(),
                torch.cuda.max_memory_reserved(),
            )
            row.process_bytes = process_bytes()
        return event_s, wall_s
    finally:
        engine.close()
        del engine, model, device_input
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def process_bytes() -> int | None:
    """What NVML says this process holds; None where it does not say (WDDM, containers)."""
    import os

    import pynvml

    try:
        pynvml.nvmlInit()
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
        return next((item.usedGpuMemory for item in processes if item.pid == os.getpid()), None)
    except pynvml.NVMLError:
        return None


def sameness(recipe: Recipe, budget_gib: float) -> dict[str, Any]:
    device = torch.device("cuda:0")
    try:
        plan = make_plan(
            recipe,
            device_spec(device),
            str(device),
            int(budget_gib * GIB),
            num_classes=NUM_CLASSES,
            num_train=NUM_TRAIN,
        )
        found = verify(recipe, plan, NUM_CLASSES, steps=3)
        return {
            "model": recipe.model.name,
            "budget_gib": budget_gib,
            "claim": plan.exactness,
            "holds": found.holds,
            "differing": found.num_differing,
            "of": found.num_entries,
            "nondeterministic": list(found.warnings),
        }
    except (LowmemError, RuntimeError) as error:
        return {"model": recipe.model.name, "budget_gib": budget_gib, "error": str(error).splitlines()[0]}


def save(report: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def print_summary(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        if row["error"]:
            print(f"{row['model']} {row['px']} px {row['budget_gib']}G: {row['error']}")
            continue
        gap = row["allocated_bytes"] / max(1, row["predicted_bytes"]) - 1
        print(
            f"{row['model']} {row['px']} px {row['budget_gib']}G: allocated {format_size(row['allocated_bytes'])} (predicted {gap:+.1%}), "
            f"reserved {row['reserved_bytes'] / MIB:.0f} MiB, step {median(row['event_s']) * 1000:.0f} ms, overhead {row['overhead']:+.1%}"
        )
    for row in report["sameness"]:
        print(f"same classifier, {row['model']} {row['budget_gib']}G: {row.get('error') or row['holds']}")


if __name__ == "__main__":
    sys.exit(main())
