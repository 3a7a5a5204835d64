"""Time against memory: predicted for a laptop card, and really trained in enforced budgets on this computer's CPU.

    python benchmarks/frontier.py --out benchmarks/results/frontier.json

Predicted: seresnextaa101d_32x8d, batch 32, 224 px, on an RTX 4060 laptop (the 16G row stands for a card of the same speed with more
memory). Trained: a network of the same family, small enough for a CPU, in budgets down to the smallest that fits. There the budget is
enforced by counting, the plan's times are those of the network's blocks measured on this CPU, each plan takes some real steps that alternate with the unconstrained run's (the overhead is
the median ratio of neighbours), and the states after three steps are compared bit by bit.

Savings: what it costs to save a share of all saved activations (SE-ResNeXt-101) or of the whole peak (ResNet-50), predicted as above.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import device_by_name, device_spec
from lowmem.planning.frontier import frontier
from lowmem.planning.known import Planning
from lowmem.planning.plan import Plan
from lowmem.planning.planner import default_ram, make_plan, plan_within
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import GIB, MIB, format_size, short_size
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.verification import reference_plan, verify

PREDICTED_GIB = (16, 8, 6, 4, 3, 2, 1.5)
TRAINED = ("model.name=seresnextaa101d_32x8d", "model.weights=none", "data.train_px=64", "batch.size=16", "amp=fp32")
SHARES = (1.0, 0.8, 0.65, 0.5, 0.4, 0.3)
"""Budgets as shares of what the unconstrained step needs."""
CLASSES, IMAGES = 100, 20_700
SAVINGS = (
    ("seresnextaa101d_32x8d", (), "activations", (0.44, 0.58, 0.79)),
    ("resnet50", ("batch.size=184", "amp=fp32", "model.weights=none"), "total", (0.33, 0.47, 0.60, 0.67)),
)
ROUNDS, STEPS = 5, 3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier.json"))
    options.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="The others stay as they are in the file.")
    chosen = options.parse_args()
    report = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {}
    made = {"command": " ".join(["python", *sys.argv]), "machine": this_machine().model_dump(), "torch_threads": torch.get_num_threads()}
    for part in chosen.parts:
        report |= {part: PARTS[part](), f"{part}_made": made}
    report |= {"trained_recipe": TRAINED, "rounds": ROUNDS, "steps_verified": STEPS}
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def predicted() -> list[dict[str, Any]]:
    spec = device_by_name("RTX 4060 laptop").model_copy(update={"memory_gib": 16.0})
    budgets = [int(gib * GIB) for gib in PREDICTED_GIB]
    recipe = load_recipe("seresnextaa101d_32x8d", ())
    rows = frontier(recipe, spec, "cuda", budgets, num_classes=CLASSES, num_train=IMAGES)
    for row in rows:
        print("predicted", *row.cells(), flush=True)
    return [asdict(row) for row in rows]


def savings() -> list[dict[str, Any]]:
    spec = device_by_name("RTX 4060 laptop").model_copy(update={"memory_gib": 64.0})
    rows = []
    for name, overrides, of, shares in SAVINGS:
        recipe = load_recipe(name, overrides)
        planning = Planning(
            recipe, spec, "cuda", budget_for(spec, 64 * GIB, "cuda"), CLASSES, IMAGES, default_ram(), "bitwise"
        )
        whole = planning.trace(planning.base_plan(recipe.batch.atom)).breakdown
        for share in shares:
            row = {
                "model": recipe.model.name,
                "batch": recipe.batch.size,
                "saved": share,
                "of": of,
                "unconstrained_bytes": whole.total,
            }
            try:
                found = plan_within(planning, whole.total - int(share * getattr(whole, of))).prediction
                assert found is not None and found.step_s and found.baseline_step_s
                row |= {"peak_bytes": found.peak.total, "overhead": found.step_s / found.baseline_step_s - 1}
            except LowmemError:
                row |= {"refused": True}
            print("savings", *row.values(), flush=True)
            rows.append(row)
    return rows


def trained() -> list[dict[str, Any]]:
    recipe = load_recipe("seresnextaa101d_32x8d", TRAINED)
    whole = plan_for(recipe, 64 * GIB)
    assert whole.prediction is not None
    return [trained_row(recipe, int(share * whole.prediction.peak.total)) for share in SHARES]


def plan_for(recipe: Recipe, budget_bytes: int) -> Plan:
    spec = device_spec(torch.device("cpu"))
    return make_plan(recipe, spec, "cpu", budget_bytes, num_classes=CLASSES, num_train=IMAGES, measure=True)


def trained_row(recipe: Recipe, budget_bytes: int) -> dict[str, Any]:
    """One budget: the prediction, the peak that was counted, time against the unconstrained run, and sameness."""
    row: dict[str, Any] = {"budget_bytes": budget_bytes}
    try:
        plan = plan_for(recipe, budget_bytes)
    except LowmemError as error:
        print("trained", short_size(budget_bytes), "refused:", error, flush=True)
        return row | {"refused": str(error)}
    assert plan.prediction is not None and plan.prediction.step_s and plan.prediction.baseline_step_s
    compared = verify(recipe, plan, CLASSES, STEPS)
    seconds, reference_s = step_seconds(recipe, plan)
    row |= {
        "predicted_bytes": plan.prediction.peak.total, "counted_bytes": compared.plan_peak_bytes, "optimizer": plan.optimizer,
        "recomputed": plan.num_recomputed, "blocks": plan.num_blocks,
        "exactness": plan.exactness, "tensors": compared.num_entries, "tensors_differing": compared.num_differing, "claim_holds": compared.holds,
        "time_source": plan.prediction.time_source, "predicted_step_s": plan.prediction.step_s, "predicted_overhead": plan.prediction.step_s / plan.prediction.baseline_step_s - 1,
        "measured_overhead": median(a / b for a, b in zip(seconds, reference_s)) - 1, "step_s": seconds, "unconstrained_step_s": reference_s,
    }  # fmt: skip
    print(
        f"trained {budget_bytes / MIB:.0f} MiB: predicted {format_size(row['predicted_bytes'])}, counted {format_size(row['counted_bytes'])}, "
        f"overhead {row['predicted_overhead']:+.1%} predicted, {row['measured_overhead']:+.1%} measured, {row['recomputed']}/{row['blocks']} blocks, "
        f"{row['optimizer']}, {row['tensors_differing']} of {row['tensors']} differ",
        flush=True,
    )
    return row


def step_seconds(recipe: Recipe, plan: Plan) -> tuple[list[float], list[float]]:
    """Seconds of single steps under the plan and of the unconstrained run, alternating."""
    engines = [
        engine_for(recipe, each) for each in (plan.model_copy(update={"budget": None}), reference_plan(plan, recipe))
    ]
    batch = random_batches(recipe, CLASSES, 1)[0]
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), torch.device("cpu"), plan.memory_format)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for engine, found in zip(engines, seconds):
            started = time.perf_counter()
            engine.train_step(batch, device_input, 1, number, 1e-5)
            if number:
                found.append(time.perf_counter() - started)
    for engine in engines:
        engine.close()
    return seconds


def engine_for(recipe: Recipe, plan: Plan) -> Engine:
    model, _ = initialised_model(recipe.model, CLASSES, recipe.seed)
    engine = Engine(model, recipe, plan, torch.ones(CLASSES, dtype=torch.int64))
    engine.enforcement.num_counted.update({"training": 10**6, "training, mixed": 10**6})  # counting takes time
    return engine


PARTS = {"predicted": predicted, "savings": savings, "trained": trained}

if __name__ == "__main__":
    main()
