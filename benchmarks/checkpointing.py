"""What checkpoints cost the training: written beside it, written in its way, and none, side by side in one process.

    python benchmarks/checkpointing.py --out benchmarks/results/checkpointing.json

Blocks of steps through the real Engine alternate between the three in random order; a block with a checkpoint makes one after its
first step and ends when it is on the disk. The cost of one checkpoint is the median over rounds of (block - block without). The
watch for memory pressure is timed in the same run.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.machine import this_machine
from lowmem.memory.pressure import EVERY_S, PressureWatch, SystemReader
from lowmem.planning.plan import Plan
from lowmem.recipe import load_recipe
from lowmem.training.checkpoint import Checkpoints
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.training.saving import Saver
from lowmem.training.schedule import first_state
from lowmem.training.state import RunState

NUM_CLASSES = 10
MODES = ("none", "beside", "in_the_way")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/checkpointing.json"))
    options.add_argument("--recipe", default="quickstart")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--batch", type=int, default=16)
    chosen = options.parse_args()
    rows = [measured(chosen, threads) for threads in sorted({1, torch.get_num_threads()})]
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "recipe": chosen.recipe,
        "batch": chosen.batch,
        "steps_per_block": chosen.steps,
        "rows": rows,
        "pressure_watch": watch_cost(torch.device(chosen.device)),
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows + [report["pressure_watch"]], indent=1))


def measured(chosen: argparse.Namespace, threads: int) -> dict[str, object]:
    torch.set_num_threads(threads)
    recipe = load_recipe(
        chosen.recipe, ("model.weights_optional=true", f"batch.size={chosen.batch}", "amp=fp32", "seed=0")
    )
    plan = Plan(device=chosen.device, device_name="", amp_dtype="fp32", micro_batch=chosen.batch)
    model, _ = initialised_model(recipe.model, NUM_CLASSES, 0)
    engine = Engine(model, recipe, plan, torch.ones(NUM_CLASSES, dtype=torch.int64))
    batches = random_batches(recipe, NUM_CLASSES, 2)
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, plan.memory_format)
    state = RunState(recipe=recipe, epoch=1, step=0, schedule=first_state(recipe), scaler=None, seed=0, dataset="x")
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    copies_s: list[float] = []
    with tempfile.TemporaryDirectory(dir=chosen.out.parent) as scratch, Saver(Checkpoints(Path(scratch))) as saver:
        saver.save(engine, state)
        for number in range(chosen.rounds + 1):
            for mode in random.Random(number).sample(MODES, len(MODES)):
                taken, copy_s = block(engine, device_input, batches, saver, state, mode, chosen.steps)
                if number:  # the first round warms up
                    seconds[mode].append(taken)
                    copies_s += [copy_s] if mode == "beside" else []
        host_bytes = saver.host_bytes
    step_s = statistics.median(seconds["none"]) / chosen.steps
    cost_s = {
        mode: statistics.median(a - b for a, b in zip(seconds[mode], seconds["none"]))
        for mode in ("beside", "in_the_way")
    }
    return {
        "torch_threads": threads,
        "rounds": chosen.rounds,
        "checkpoint_bytes": host_bytes,
        "step_ms": round(1000 * step_s, 1),
        "copy_ms": round(1000 * statistics.median(copies_s), 1),
        "cost_ms": {mode: round(1000 * value, 1) for mode, value in cost_s.items()},
        "cost_in_steps": {mode: round(value / step_s, 2) for mode, value in cost_s.items()},
        "share_of_time_at_one_in_10m": {mode: round(value / 600, 6) for mode, value in cost_s.items()},
        "ratio_of_blocks": {
            mode: round(statistics.median(a / b for a, b in zip(seconds[mode], seconds["none"])), 4)
            for mode in ("beside", "in_the_way")
        },
        "block_s": {mode: [round(value, 4) for value in values] for mode, values in seconds.items()},
    }


def block(
    engine: Engine, device_input: DeviceInput, batches: list, saver: Saver, state: RunState, mode: str, num_steps: int
) -> tuple[float, float]:
    """Seconds of a block of steps, and of the copy to the host buffer in it."""
    started, copy_s = time.perf_counter(), 0.0
    for step in range(num_steps):
        float(engine.train_step(batches[step % 2], device_input, 1, step, 1e-4))
        if step == 0 and mode != "none":
            before = time.perf_counter()
            if mode == "beside":
                saver.save(engine, state)
            else:
                saver.checkpoints.write(saver.copy(engine, state))
            copy_s = time.perf_counter() - before
    saver.wait()
    return time.perf_counter() - started, copy_s


def watch_cost(device: torch.device) -> dict[str, float]:
    """Microseconds of the watch in each step, and of its look at the system every few seconds."""
    read = SystemReader(device)
    watch = PressureWatch(read, print, every_s=float("inf"))
    started = time.perf_counter()
    for _ in range(100_000):
        watch.step()
    step_s = (time.perf_counter() - started) / 100_000
    started = time.perf_counter()
    for _ in range(200):
        watch._look()
    look_s = (time.perf_counter() - started) / 200
    return {
        "step_us": round(1e6 * step_s, 3),
        "look_us": round(1e6 * look_s, 1),
        "share_of_time": round(look_s / EVERY_S + step_s / 0.1, 6),
        "share_is_of_steps_of_s": 0.1,
    }


if __name__ == "__main__":
    main()
