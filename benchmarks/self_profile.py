"""What a run's profile of itself costs: steps with the clock of phases open and closed, side by side in one process.

    python benchmarks/self_profile.py --out benchmarks/results/self_profile.json

Blocks of steps through the real Engine alternate in random order; the overhead is the median over rounds of (open / closed) - 1, with the
95 % interval of that median by its order statistics. The marks of a step are also counted and timed by themselves. Two cases: nothing
recomputed, and every block recomputed, which marks most.
"""

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.machine import this_machine
from lowmem.phases import HostClock, phase, timing_phases
from lowmem.planning.blocks import find_blocks
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.recipe import load_recipe
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model

NUM_CLASSES, BATCH, PX = 10, 8, 64


class CountingClock(HostClock):
    num_marks = 0

    def mark(self, name: str) -> None:
        self.num_marks += 1
        super().mark(name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/self_profile.json"))
    options.add_argument("--rounds", type=int, default=60)
    options.add_argument("--steps", type=int, default=6)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = [measured(recomputed, chosen.rounds, chosen.steps) for recomputed in (False, True)]
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "torch_threads": 1,
        "recipe": "quickstart",
        "batch": BATCH,
        "px": PX,
        "rows": rows,
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps([{key: value for key, value in row.items() if key != "ratios"} for row in rows], indent=1))


def measured(recomputed: bool, rounds: int, steps: int) -> dict[str, object]:
    recipe = load_recipe(
        "quickstart", ("model.weights=none", f"batch.size={BATCH}", f"data.train_px={PX}", "amp=fp32", "seed=0")
    )
    model, _ = initialised_model(recipe.model, NUM_CLASSES, 0)
    blocks = {path: BlockPolicy(recompute="full") for path in find_blocks(model)} if recomputed else {}
    plan = Plan(device="cpu", device_name="", amp_dtype="fp32", micro_batch=BATCH, blocks=blocks)
    engine = Engine(model, recipe, plan, torch.ones(NUM_CLASSES, dtype=torch.int64))
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, plan.memory_format)
    batches = random_batches(recipe, NUM_CLASSES, 2)

    def block(profiled: bool, num_steps: int) -> float:
        started = time.perf_counter()
        with timing_phases(HostClock()) if profiled else nullcontext():
            for step in range(num_steps):
                with phase("waiting"):
                    batch = batches[step % 2]
                engine.train_step(batch, device_input, 1, step, 0.0)
        return time.perf_counter() - started

    block(True, 5)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for profiled in random.Random(number).sample((True, False), 2):
            seconds[profiled].append(block(profiled, steps))
    ratios = [on / off - 1 for on, off in zip(seconds[True], seconds[False])]
    step_s = statistics.median(seconds[False]) / steps
    num_marks, mark_s = marks_of_a_step(engine, device_input, batches[0])
    low, high = median_interval(ratios)
    return {
        "blocks_recomputed": len(blocks),
        "n": rounds,
        "steps_per_block": steps,
        "step_ms": round(1000 * step_s, 2),
        "overhead_frac": round(statistics.median(ratios), 5),
        "overhead_frac_95": [round(low, 5), round(high, 5)],
        "marks_per_step": num_marks,
        "mark_us": round(1e6 * mark_s, 3),
        "marks_share_of_step": round(num_marks * mark_s / step_s, 6),
        "ratios": [round(ratio, 5) for ratio in ratios],
    }


def marks_of_a_step(engine: Engine, device_input: DeviceInput, batch: object) -> tuple[int, float]:
    clock = CountingClock()
    with timing_phases(clock):
        clock.num_marks = 0
        engine.train_step(batch, device_input, 1, 0, 0.0)
        num_marks, times = clock.num_marks, 100_000
        started = time.perf_counter()
        for _ in range(times):
            with phase("forward"):
                pass
        return num_marks, (time.perf_counter() - started) / (2 * times)


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics (normal approximation of the binomial)."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    return ordered[max(0, int(n / 2 - reach))], ordered[min(n - 1, int(n / 2 + reach))]


if __name__ == "__main__":
    main()
