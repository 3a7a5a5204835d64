"""What each way of loading takes from a training loop: threads and processes beside real steps, in turn, in one process.

    python benchmarks/loader_training.py --out benchmarks/results/loader_training.json

Two loops on the embedded images, through the stations of `lowmem bench`: one whose steps are long computations on all cores, and one whose
steps are hundreds of small operations on one core, which need Python's lock as often as a loop that launches kernels on a card. Each
way of loading, and batches that are there already (no loading), take a round of about a second in every turn. Given are medians over
rounds: images/s, the share of time spent waiting for a batch, and the rest of a step relative to that without loading in the same
turn, which is what loading takes from the step. Memory is what loading alone adds in a fresh process (PSS where the system has it).
"""

import argparse
import json
import statistics
import sys
from contextlib import closing
from pathlib import Path

import torch

from lowmem.benchmarking.station import Work
from lowmem.data.folder import embedded_images, open_dataset
from lowmem.machine import this_machine, usable_cores
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.profiling.measure import Stations, measure_loader
from lowmem.recipe import load_recipe

LOOPS = {
    "long computations": ("model.name=resnet18", "data.train_px=128", "batch.size=16"),
    "many small operations": ("model.name=test_resnet", "data.train_px=64", "batch.size=4"),
}
SHARED = ("model.weights=none", "amp=fp32", "mixup.prob=0")
WAYS = {
    "in line": ("inline", 0),
    "1 thread": ("threads", 1),
    "2 threads": ("threads", 2),
    "1 process": ("processes", 1),
    "2 processes": ("processes", 2),
}
NUM_CLASSES, ALONE_S = 10, 4.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_training.json"))
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args()
    report = {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "rounds": chosen.rounds,
        "loops": {name: measured(name, chosen.rounds) for name in LOOPS},
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["loops"], indent=1))


def measured(loop: str, rounds: int) -> dict[str, object]:
    recipe = load_recipe("quickstart", (*LOOPS[loop], *SHARED))
    split = open_dataset(embedded_images().resolve(), recipe.data.val_fraction, recipe.seed).train
    torch_threads = usable_cores() if loop == "long computations" else 1
    plans = {name: plan_for(kind, workers, torch_threads, recipe.batch.size) for name, (kind, workers) in WAYS.items()}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in ("no loading", *plans)}
    threads = torch.get_num_threads()
    with (
        closing(Stations(Work(recipe, NUM_CLASSES), on_card=False)) as still,
        closing(Stations(Work(recipe, NUM_CLASSES, split), on_card=False)) as loading,
    ):
        for number in range(rounds + 1):
            for name in steps:
                found = (still if name == "no loading" else loading).visit(plans.get(name, plans["in line"])).round
                if number:  # the first turn opens and warms up
                    steps[name].append((found.seconds / found.num_steps, found.wait_data_s / found.num_steps))
    torch.set_num_threads(threads)
    alone = {name: measure_loader(split, recipe, plan.loader, ALONE_S, float("inf")) for name, plan in plans.items()}
    return {
        "recipe": ["quickstart", *LOOPS[loop], *SHARED],
        "torch_threads": torch_threads,
        "ways": {
            name: row(values, steps["no loading"], recipe.batch.size)
            | ({"extra_bytes": alone[name].extra_bytes, "bytes_are": alone[name].memory_kind} if name in alone else {})
            for name, values in steps.items()
        },
    }


def row(values: list[tuple[float, float]], still: list[tuple[float, float]], batch: int) -> dict[str, object]:
    def median(found: list[float]) -> float:
        return float(f"{statistics.median(found):.4g}")

    working = [(step - wait) / other for (step, wait), (other, _) in zip(values, still)]
    return {
        "images_per_s": median([batch / step for step, _ in values]),
        "waiting_share": median([wait / step for step, wait in values]),
        "rest_of_the_step": median(working),
        "rest_of_the_step_spread": [round(min(working), 3), round(max(working), 3)],
    }


def plan_for(kind: str, workers: int, torch_threads: int, batch: int) -> Plan:
    loader = LoaderPlan(kind=kind, workers=workers, max_workers=workers, torch_threads=torch_threads)
    return Plan(device="cpu", device_name="", amp_dtype="fp32", micro_batch=batch, loader=loader)


if __name__ == "__main__":
    main()
