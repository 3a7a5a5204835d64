"""Whether more memory never makes a plan slower: predictions over many budgets of a recipe on a device that need not be here.

    python benchmarks/monotone.py --out benchmarks/results/monotone.json

Each budget is planned as `lowmem plan --vram` plans it. From the smallest budget to the largest: the predicted peak must not fall, the
predicted time must not rise, no peak may be above what the budget leaves for tensors, and where the budget binds (the
unconstrained step does not fit) at least 92 % of that is to be used. Exit code 1 where one of these does not hold.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec, device_by_name
from lowmem.planning.known import Planning, with_budget
from lowmem.planning.planner import default_ram, plan_within
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import GIB, format_size

CASES = (("seresnextaa101d_32x8d", ()), ("seresnextaa101d_32x8d", ("model.name=resnet50", "batch.size=64")))
LOWEST_GIB, HIGHEST_GIB = 1.2, 24.0
CLASSES, IMAGES = 100, 20_700
USED_AT_LEAST = 0.92


@dataclass(frozen=True)
class Point:
    """One budget. `room_bytes` is what it leaves for tensors; a budget that nothing fits has no peak."""

    budget_bytes: int
    room_bytes: int
    peak_bytes: int | None
    step_s: float | None
    binds: bool


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/monotone.json"))
    options.add_argument("--budgets", type=int, default=200)
    chosen = options.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": this_machine().model_dump(),
        "cases": [],
    }
    for name, overrides in CASES:
        recipe = load_recipe(name, (*overrides, "model.weights=none"))
        # A card of the speed of a 4060 laptop with 24 GiB, so that every budget can be asked for.
        spec = device_by_name("RTX 4060 laptop").model_copy(update={"memory_gib": HIGHEST_GIB})
        case = judged(points_of(recipe, spec, chosen.budgets))
        print(
            f"{recipe.model.name}, batch {recipe.batch.size}: "
            + ", ".join(f"{k} {v}" for k, v in case.items() if k != "points")
        )
        report["cases"].append(
            {"model": recipe.model.name, "batch": recipe.batch.size, "px": recipe.data.train_px} | case
        )
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(not all(case["holds"] for case in report["cases"]))


def points_of(recipe: Recipe, spec: DeviceSpec, num_budgets: int) -> list[Point]:
    """The budgets in ascending order, evenly spaced in their logarithm."""
    budgets = [int(GIB * gib) for gib in np.geomspace(LOWEST_GIB, HIGHEST_GIB, num_budgets)]
    planning = Planning(
        recipe, spec, "cuda", budget_for(spec, budgets[-1], "cuda"), CLASSES, IMAGES, default_ram(), "rounding"
    )
    unconstrained = planning.trace(planning.base_plan(recipe.batch.atom)).peak_bytes
    return [point(with_budget(planning, spec, budget), budget, unconstrained) for budget in budgets]


def point(planning: Planning, budget_bytes: int, unconstrained_bytes: int) -> Point:
    room = planning.budget.tensor_bytes
    try:
        found = plan_within(planning, room).prediction
    except LowmemError:
        found = None
    binds = room < unconstrained_bytes
    if found is None:
        return Point(budget_bytes, room, None, None, binds)
    return Point(budget_bytes, room, found.peak.total, found.step_s, binds)


def judged(points: list[Point]) -> dict[str, Any]:
    fitting = [point for point in points if point.peak_bytes is not None and point.step_s is not None]
    refused_above = [p for p in points if p.peak_bytes is None and p.budget_bytes > fitting[0].budget_bytes]
    binding = [point for point in fitting if point.binds]
    used = [point.peak_bytes / point.room_bytes for point in binding]
    counts = {
        "budgets": len(points),
        "fitting": len(fitting),
        "binding": len(binding),
        "smallest_fitting": format_size(fitting[0].budget_bytes),
        "peaks_that_fall": sum(b.peak_bytes < a.peak_bytes for a, b in pairwise(fitting)),
        "times_that_rise": sum(b.step_s > a.step_s for a, b in pairwise(fitting)),
        "peaks_above_the_budget": sum(point.peak_bytes > point.room_bytes for point in fitting),
        "refused_above_a_fitting_one": len(refused_above),
        "least_used": round(min(used, default=1.0), 4),
        "median_used": round(median(used) if used else 1.0, 4),
    }
    broken = sum(
        counts[name]
        for name in ("peaks_that_fall", "times_that_rise", "peaks_above_the_budget", "refused_above_a_fitting_one")
    )
    return counts | {
        "holds": broken == 0 and counts["least_used"] >= USED_AT_LEAST,
        "points": [asdict(point) for point in points],
    }


if __name__ == "__main__":
    sys.exit(main())
