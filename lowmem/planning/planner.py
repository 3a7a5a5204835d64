"""Recipe x device x budget -> Plan.

The unconstrained step is traced. If it fits, that is the plan. Otherwise each block's options are traced, the program in solve.py
mixes them for each placement of the optimizer, and the cheapest mix is traced again as a whole: it must fit, or the limit is
tightened by what it missed.
"""

import math
from collections.abc import Callable

import psutil
import torch

from lowmem.errors import LowmemError
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec, device_by_name, device_spec
from lowmem.planning.explain import reasons_for
from lowmem.planning.known import Planning, host_state_bytes
from lowmem.planning.measure import load_times, times_file
from lowmem.planning.plan import Budget, Exactness, Plan, Prediction
from lowmem.planning.search import (
    Candidate,
    cheapest_within,
    micro_batches,
    placements,
    policies,
    problem,
    step_seconds,
)
from lowmem.planning.solve import leanest
from lowmem.planning.timing import Clock
from lowmem.planning.trace import StepTrace, optimizer_bytes, trace_evaluation, trace_step
from lowmem.recipe import Recipe
from lowmem.sizes import GIB, MIB, format_size
from lowmem.training.ema import ema_bytes

EXACTNESS: tuple[Exactness, ...] = ("bitwise", "rounding", "statistical")
RUNG = 0.98
"""Ratio of neighbouring limits; with GOOD_ENOUGH, a plan uses at least 0.98 x 0.984 of what it may where the limit binds."""
LEANER_FRAC = 0.93
LARGEST_EVAL_BATCH = 128
DEFAULT_RAM_SHARE = 0.5


def make_plan(
    recipe: Recipe,
    spec: DeviceSpec,
    device: str,
    vram_bytes: int,
    *,
    ram_bytes: int | None = None,
    num_classes: int,
    num_train: int,
    allow: str = "rounding",
    measure: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The cheapest plan for a recipe within `vram_bytes`; raises LowmemError where none fits.

    `allow`: the least exact plan that may be chosen. `measure`: time the network's blocks on the device, which must be here, where
    the budget leaves a choice; times that were taken before are used in any case.
    """
    if allow not in EXACTNESS:
        raise LowmemError(f"--allow {allow}: give bitwise, rounding or statistical.")
    budget = budget_for(spec, vram_bytes, device)
    planning = Planning(recipe, spec, device, budget, num_classes, num_train, ram_bytes or default_ram(), allow)
    base = planning.base_plan(recipe.batch.atom)
    if spec.present:
        planning.clock = Clock(spec, load_times(times_file(torch.device(device), base.memory_format)))
        if measure and planning.trace(base).peak_bytes > budget.tensor_bytes:
            planning.measure(base, say)
    return plan_within(planning, budget.tensor_bytes)


def leaner_plan(plan: Plan, recipe: Recipe, *, num_classes: int, num_train: int) -> Plan:
    """The next leaner plan after a step ran out of memory under `plan`; raises LowmemError where there is none."""
    spec = device_by_name("cpu") if plan.device == "cpu" else _spec_of(plan)
    budget = plan.budget or Budget(total_bytes=spec.memory_bytes)
    used = plan.prediction.peak.total if plan.prediction else budget.tensor_bytes
    planning = Planning(recipe, spec, plan.device, budget, num_classes, num_train, default_ram(), plan.exactness)
    lean = plan_within(planning, int(LEANER_FRAC * min(used, budget.tensor_bytes)))
    told = (
        f"it keeps {format_size(lean.prediction.peak.total)} on the device instead of {format_size(used)}"
        if lean.prediction
        else "leaner"
    )
    return lean.model_copy(update={"loader": plan.loader, "reasons": (told, *lean.reasons)})


def plan_within(planning: Planning, limit_bytes: int) -> Plan:
    """The cheapest plan whose traced peak is at most `limit_bytes`."""
    base = planning.base_plan(planning.recipe.batch.atom)
    trace = planning.trace(base)
    baseline_s = step_seconds(planning, base, 0.0)
    if trace.peak_bytes <= limit_bytes:
        found: Candidate | None = Candidate(base, trace, baseline_s)
    else:
        found = _on_rung(planning, trace.peak_bytes, limit_bytes) or cheapest_within(planning, limit_bytes)
    if found is None:
        raise LowmemError(_too_small(planning, limit_bytes))
    return _finished(planning, found, baseline_s, limit_bytes)


def _on_rung(planning: Planning, unconstrained_bytes: int, limit_bytes: int) -> Candidate | None:
    """The cheapest plan within the largest of a fixed ladder of limits that `limit_bytes` reaches.

    A slightly different budget then gives the same plan, and a smaller one never a cheaper plan or a larger peak: a rung
    lower, less is allowed than what a good plan of the rung above uses.
    """
    rung = math.ceil(math.log(limit_bytes / unconstrained_bytes, RUNG) - 1e-9)
    if rung not in planning.rungs:
        planning.rungs[rung] = cheapest_within(planning, int(unconstrained_bytes * RUNG**rung))
    return planning.rungs[rung]


def default_ram() -> int:
    """Half of the machine's memory."""
    return int(DEFAULT_RAM_SHARE * psutil.virtual_memory().total)


def _finished(planning: Planning, candidate: Candidate, baseline_s: float, limit_bytes: int) -> Plan:
    """The plan with its evaluation batch, prediction and reasons."""
    steps = max(1, planning.num_train // planning.recipe.batch.size)
    held = host_state_bytes(planning, candidate.plan.optimizer)
    prediction = Prediction(
        peak=candidate.trace.breakdown,
        host_bytes=candidate.trace.host_bytes + held,
        step_s=candidate.step_s,
        epoch_s=candidate.step_s * steps,
        baseline_step_s=baseline_s,
        time_source=planning.clock.source(candidate.trace.ops),
    )
    plan = candidate.plan.model_copy(
        update={
            "device": planning.device,
            "prediction": prediction,
            "eval_batch": _eval_batch(planning, candidate.plan, limit_bytes),
        }
    )
    return plan.model_copy(
        update={"reasons": tuple(reasons_for(plan, planning.traces[(planning.recipe.batch.atom, "device")].peak_bytes))}
    )


def _eval_batch(planning: Planning, plan: Plan, limit_bytes: int) -> int:
    """Images per evaluation batch within the limit, beside the optimizer's state; at least one."""
    px = max(planning.recipe.data.val_px, planning.recipe.data.test_px)
    weights = sum(t.nbytes for t in (*planning.network.model.parameters(), *planning.network.model.buffers()))
    per_image = max(1, (trace_evaluation(planning.network, plan, px, 2) - weights) // 2)
    resident = (
        weights
        + ema_bytes(planning.network.model, planning.recipe.ema)
        + optimizer_bytes(planning.named, plan.optimizer)
    )
    return max(1, min(LARGEST_EVAL_BATCH, (limit_bytes - resident) // per_image))


def _too_small(planning: Planning, limit_bytes: int) -> str:
    """The refusal: what would fit, and which fields of the recipe would help."""
    recipe = planning.recipe
    base = planning.base_plan(micro_batches(planning)[-1])
    trace = planning.trace(base)
    smallest = _smallest_peak(planning, base, trace)
    taken = planning.budget.total_bytes - planning.budget.tensor_bytes
    needed = 1.005 * (smallest + taken)
    wanted = f"{math.ceil(needed / (0.1 * GIB)) / 10:.1f}G" if needed > GIB else f"{math.ceil(needed / MIB)}M"
    helps = [f"data.train_px={recipe.data.train_px * 3 // 4}"]
    if planning.batchnorm and recipe.batch.atom > 1:
        helps.append(f"batch.norm_batch={recipe.batch.atom // 2} (another classifier)")
    if planning.batchnorm and planning.allow != "statistical":
        helps.append("or --allow statistical, which splits the norm batch")
    return (
        f"--vram {format_size(planning.budget.total_bytes)} is too small for {recipe.model.name} at batch {recipe.batch.size} and "
        f"{recipe.data.train_px} px: the leanest plan needs {format_size(smallest + taken)}. Use --vram {wanted}, or in the recipe "
        f"{', '.join(helps)}."
    )


def _smallest_peak(planning: Planning, base: Plan, trace: StepTrace) -> float:
    """Of the leanest plan, traced as a whole; which one that is, the program says."""
    found = []
    for placement in placements(planning):
        program = problem(planning, base, trace, placement)
        solution = leanest(program)
        if solution is not None:
            plan = base.model_copy(update={"optimizer": placement, "blocks": policies(program, solution)})
            found.append((solution.peak_bytes, plan))
    if not found:
        return math.inf
    return trace_step(planning.network, min(found, key=lambda item: item[0])[1], planning.recipe).peak_bytes


def _spec_of(plan: Plan) -> DeviceSpec:
    return device_spec(torch.device(plan.device))
