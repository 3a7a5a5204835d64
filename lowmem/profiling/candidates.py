"""What is worth measuring: plans at and below a budget, micro-batches where the recipe allows them, and ways to load."""

import math
import time
from dataclasses import dataclass

from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.memory.batchnorm import has_live_batchnorm
from lowmem.planning.devices import DeviceSpec
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import LoaderPlan, Plan, Prediction
from lowmem.planning.planner import make_plan
from lowmem.planning.trace import trace_step
from lowmem.profiling.result import PlanCase
from lowmem.recipe import Recipe
from lowmem.sizes import format_size

BELOW = (0.8, 0.62, 0.48, 0.36)
"""Shares of the best plan's memory at which leaner plans are made."""
MOST_PARTS = 4
WORKER_COUNTS = (1, 2, 4, 8, 12)
PREFETCH = (2, 4)


@dataclass(frozen=True)
class Question:
    """What plans are made for."""

    recipe: Recipe
    spec: DeviceSpec
    device: str
    vram_bytes: int
    ram_bytes: int
    num_classes: int
    num_train: int

    def planned(self, budget_bytes: int) -> Plan:
        counts = {"num_classes": self.num_classes, "num_train": self.num_train}
        return make_plan(self.recipe, self.spec, self.device, budget_bytes, ram_bytes=self.ram_bytes, **counts)


def plan_cases(asked: Question, until: float = math.inf) -> tuple[list[PlanCase], list[str]]:
    """(plans within the budget that differ, names of those left out for lack of time); raises LowmemError where none fits.

    The plan for the whole budget comes first, and then the others by how little their memory differs from its. After it no plan is begun
    that would not be made by `until`, a time of `time.monotonic`, if it took as long.
    """
    started = time.monotonic()
    first = asked.planned(asked.vram_bytes)
    each_s = time.monotonic() - started
    assert first.prediction is not None and first.budget is not None
    taken = first.budget.total_bytes - first.budget.tensor_bytes
    found, left_out = [first], []
    for share in BELOW:
        if time.monotonic() + each_s > until:
            left_out.append(f"a plan with {100 * share:.0f} % of the memory")
            continue
        try:
            found.append(asked.planned(taken + int(share * first.prediction.peak.total)))
        except LowmemError:  # the leanest plan is above this share
            break
    if time.monotonic() + each_s > until:
        left_out.append("batches in parts")
    else:
        found += _split(first, asked.recipe, asked.num_classes)
    return _named([plan.model_copy(update={"budget": first.budget}) for plan in _distinct(found)]), left_out


def loader_plans(base: LoaderPlan) -> list[LoaderPlan]:
    """In line, threads and processes, up to as many as there are cores; more prefetch with the most threads. Those like `base` first."""
    counts = [count for count in WORKER_COUNTS if count <= usable_cores()]
    plans = [base.model_copy(update={"kind": "inline", "workers": 0})]
    for n in counts:
        changes = {"workers": n, "prefetch_batches": 2}
        plans += [base.model_copy(update={"kind": kind} | changes) for kind in ("threads", "processes")]
    last = {"kind": "threads", "workers": counts[-1], "prefetch_batches": PREFETCH[-1]}
    return sorted([*plans, base.model_copy(update=last)], key=lambda loader: _distance(loader, base))


def _distance(loader: LoaderPlan, base: LoaderPlan) -> int:
    other_kind = bool(loader.workers) and loader.kind != base.kind
    return abs(loader.workers - base.workers) + other_kind + (loader.prefetch_batches != base.prefetch_batches)


def loader_name(loader: LoaderPlan) -> str:
    if loader.kind == "inline" or not loader.workers:
        return "in line"
    kind = loader.kind[:-1] if loader.workers == 1 and loader.kind == "threads" else loader.kind
    kind = "process" if loader.workers == 1 and loader.kind == "processes" else kind
    more = f", {loader.prefetch_batches} ahead" if loader.prefetch_batches != 2 else ""
    return f"{loader.workers} {kind}{more}"


def _split(first: Plan, recipe: Recipe, num_classes: int) -> list[Plan]:
    """Parts of the batch, with nothing recomputed, where no batch norm looks across its images."""
    network = FakeNetwork(recipe, num_classes)
    if has_live_batchnorm(network.model):
        return []
    plans, size = [], recipe.batch.atom
    while size > 1 and recipe.batch.atom // size < MOST_PARTS:
        size = (size + 1) // 2
        changes = {"micro_batch": size, "blocks": {}, "optimizer": "device", "exactness": "rounding", "device": "cpu"}
        trace = trace_step(network, first.model_copy(update=changes), recipe)
        told = (f"The batch is split over passes of {size} images; only the rounding of sums changes.",)
        changes |= {"device": first.device, "prediction": Prediction(peak=trace.breakdown), "reasons": told}
        plans.append(first.model_copy(update=changes))
    assert first.budget is not None
    return [plan for plan in plans if _peak_bytes(plan) <= first.budget.tensor_bytes]


def _distinct(plans: list[Plan]) -> list[Plan]:
    """Without repetition, the first in front, and the others by their distance from it in memory."""
    seen: dict[str, Plan] = {}
    for plan in plans:
        seen.setdefault(plan.model_dump_json(include={"micro_batch", "blocks", "optimizer"}), plan)
    return sorted(seen.values(), key=lambda plan: abs(_peak_bytes(plan) - _peak_bytes(plans[0])))


def _peak_bytes(plan: Plan) -> int:
    return plan.prediction.peak.total if plan.prediction else 0


def _named(plans: list[Plan]) -> list[PlanCase]:
    return [PlanCase(name=_name(plan), plan=plan) for plan in plans]


def _name(plan: Plan) -> str:
    recomputed, offloaded = plan.num_recomputed, plan.num_offloaded
    parts = [f"passes of {plan.micro_batch}"]
    parts += [f"{recomputed} of {plan.num_blocks} blocks run again"] if recomputed else []
    parts += [f"{offloaded} blocks in host memory"] if offloaded else []
    parts += [f"optimizer {plan.optimizer.replace('_', ', ')}"] if plan.optimizer != "device" else []
    predicted = format_size(plan.prediction.peak.total) if plan.prediction else "?"
    return f"{predicted}: {', '.join(parts)}"
