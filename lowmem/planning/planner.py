"""Recipe x device x budget -> Plan.

The unconstrained step is traced. If it fits, that is the plan. Otherwise each block's options are traced, the program in solve.py
mixes them for each placement of the optimizer, and the cheapest mix is traced again as a whole: it must fit, or the limit is
tightened by what it missed.
"""

import math
from dataclasses import dataclass, field, replace

from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.memory.batchnorm import has_live_batchnorm
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec, device_by_name, settle_amp
from lowmem.planning.explain import reasons_for
from lowmem.planning.network import FakeNetwork
from lowmem.planning.options import Option, block_options, block_signature
from lowmem.planning.plan import KEEP_ALL, Budget, Exactness, LoaderPlan, Placement, Plan, Prediction
from lowmem.planning.solve import BlockTerm, Problem, Solution, cheapest, leanest, least_extra_s
from lowmem.planning.timing import ema_seconds, link_seconds, optimizer_seconds, seconds
from lowmem.planning.trace import StepTrace, optimizer_bytes, trace_evaluation, trace_step
from lowmem.recipe import Recipe
from lowmem.sizes import GIB, MIB, format_size
from lowmem.training.ema import ema_bytes

EXACTNESS: tuple[Exactness, ...] = ("bitwise", "rounding", "statistical")
MAX_TRIES = 4
GOOD_ENOUGH = 0.025
"""A plan that leaves this share of the limit unused is not improved further."""
ALLOWANCES = (0.0, 0.02, 0.05)
"""How far above the limit, as a share of it, a mix may be in the program's eyes and still be traced."""
RUNG = 0.97
"""Ratio of neighbouring limits; with GOOD_ENOUGH, a plan uses at least 0.97 x 0.975 of what it may where the limit binds."""
LEANER_FRAC = 0.93
LARGEST_EVAL_BATCH = 128
LINK_SHARE = 0.9
"""How much of the forward pass copies to the host may fill; what would not fit would make the device wait."""
DEFAULT_RAM_SHARE = 0.5
IN_BACKWARD_S = 3e-4
"""What the many small updates of the optimizer in the backward pass add to a step."""


@dataclass
class Planning:
    """What is known while a plan is made: one recipe on one device under one budget."""

    recipe: Recipe
    spec: DeviceSpec
    device: str
    budget: Budget
    num_classes: int
    num_train: int
    ram_bytes: int
    allow: Exactness
    network: FakeNetwork = field(init=False)
    traces: dict[tuple[int, Placement], StepTrace] = field(default_factory=dict)
    options: dict[int, list[list[Option]]] = field(default_factory=dict)
    rungs: "dict[int, Candidate | None]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.amp = settle_amp(self.recipe.amp, self.spec)
        self.network = FakeNetwork(self.recipe, self.num_classes)
        self.batchnorm = has_live_batchnorm(self.network.model)
        self.named = {name: p for name, p in self.network.model.named_parameters() if p.requires_grad}

    def base_plan(self, micro_batch: int) -> Plan:
        """Nothing recomputed, offloaded or moved; on the CPU, where fake tensors live, until it is finished."""
        split = micro_batch < self.recipe.batch.atom
        exactness: Exactness = "bitwise" if not split else "statistical" if self.batchnorm else "rounding"
        return Plan(
            device="cpu",
            device_name=self.spec.name,
            amp_dtype=self.amp,
            micro_batch=micro_batch,
            autocast_cache=False,
            exactness=exactness,
            budget=self.budget,
            loader=loader_plan(self.spec),
            num_blocks=len(self.network.blocks),
        )

    def trace(self, plan: Plan) -> StepTrace:
        """The unconstrained step of a micro-batch; a model whose meta build cannot be traced is built for real."""
        key = (plan.micro_batch, plan.optimizer)
        if key not in self.traces:
            try:
                self.traces[key] = trace_step(self.network, plan, self.recipe)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                if getattr(self, "rebuilt", False):
                    raise LowmemError(
                        f"{self.recipe.model.name} cannot be traced: {str(error).splitlines()[0]}"
                    ) from error
                self.rebuilt = True
                self.network = FakeNetwork(self.recipe, self.num_classes, real_build=True)
                return self.trace(plan)
        return self.traces[key]

    def block_options(self, plan: Plan) -> list[list[Option]]:
        """Options of each block in forward order, traced once for blocks that are the same."""
        if plan.micro_batch not in self.options:
            trace, known = self.trace(plan), {}
            found = []
            for path in usable_blocks(trace):
                moments = trace.blocks[path]
                signature = block_signature(self.network.blocks[path], moments)
                if signature not in known:
                    known[signature] = block_options(
                        self.network, path, moments, plan, self.spec, self.spec.kind == "cuda"
                    )
                found.append(known[signature])
            self.options[plan.micro_batch] = found
        return self.options[plan.micro_batch]


@dataclass(frozen=True)
class Candidate:
    """A whole plan that was traced and fits."""

    plan: Plan
    trace: StepTrace
    step_s: float


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
) -> Plan:
    """The cheapest plan for a recipe within `vram_bytes`; raises LowmemError where none fits.

    `allow`: the least exact plan that may be chosen.
    """
    if allow not in EXACTNESS:
        raise LowmemError(f"--allow {allow}: give bitwise, rounding or statistical.")
    budget = budget_for(spec, vram_bytes, device)
    planning = Planning(recipe, spec, device, budget, num_classes, num_train, ram_bytes or default_ram(), allow)
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
    baseline_s = _step_seconds(planning, trace, base, 0.0)
    if trace.peak_bytes <= limit_bytes:
        found: Candidate | None = Candidate(base, trace, baseline_s)
    else:
        found = _on_rung(planning, trace.peak_bytes, limit_bytes) or _cheapest_within(planning, limit_bytes)
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
        planning.rungs[rung] = _cheapest_within(planning, int(unconstrained_bytes * RUNG**rung))
    return planning.rungs[rung]


def _cheapest_within(planning: Planning, limit_bytes: int) -> Candidate | None:
    found = [
        candidate
        for micro_batch in _micro_batches(planning)
        if (candidate := _best_of(planning, micro_batch, limit_bytes))
    ]
    return min(found, key=lambda item: item.step_s, default=None)


def usable_blocks(trace: StepTrace) -> list[str]:
    """Blocks that run once in a forward pass and have a backward pass, in forward order."""
    return [path for path in trace.order if trace.blocks[path].num_calls == 1 and trace.blocks[path].backward_start]


def loader_plan(spec: DeviceSpec) -> LoaderPlan:
    """Workers beside the step: all cores but one where a card computes; one where the processor does."""
    cores = usable_cores()
    if spec.kind == "cpu":
        return LoaderPlan(workers=1, torch_threads=cores)
    return LoaderPlan(workers=max(1, min(8, cores - 1)), pin_memory=spec.present)


def default_ram() -> int:
    """Half of the machine's memory."""
    import psutil

    return int(DEFAULT_RAM_SHARE * psutil.virtual_memory().total)


def _micro_batches(planning: Planning) -> list[int]:
    """Images per forward pass to try: the atom, and parts of it where that is allowed."""
    atom = planning.recipe.batch.atom
    allowed = planning.allow == "statistical" or (planning.allow == "rounding" and not planning.batchnorm)
    if not allowed:
        return [atom]
    parts = [atom]
    while parts[-1] > 1:
        parts.append((parts[-1] + 1) // 2)
    return parts


def _best_of(planning: Planning, micro_batch: int, limit_bytes: int) -> Candidate | None:
    """The cheapest plan at one micro-batch that fits as a whole: placements in the order of what the program says they cost."""
    base = planning.base_plan(micro_batch)
    trace = planning.trace(base)
    drafts = []
    for placement in _placements(planning):
        plan = base.model_copy(update={"optimizer": placement})
        problem = _problem(planning, base, trace, placement)
        extra_s = least_extra_s(problem, int((1 + ALLOWANCES[-1]) * limit_bytes))
        if extra_s is not None:
            drafts.append((_step_seconds(planning, trace, plan, extra_s), plan, problem))
    best: Candidate | None = None
    for bound_s, plan, problem in sorted(drafts, key=lambda draft: draft[0]):
        if best is None or bound_s < best.step_s:
            found = _fitted(planning, plan, problem, limit_bytes, trace)
            best = found if found is not None and (best is None or found.step_s < best.step_s) else best
    return best


def _fitted(
    planning: Planning, base: Plan, problem: Problem, limit_bytes: int, unconstrained: StepTrace
) -> Candidate | None:
    """Trace the program's answer as a whole, and tighten or relax its limit by what it misjudged."""
    best: Candidate | None = None
    solution = _first_solution(problem, limit_bytes)
    for _ in range(MAX_TRIES):
        if solution is None:
            break
        step_s = _step_seconds(planning, unconstrained, base, solution.extra_s)
        if best is not None and step_s >= best.step_s:
            break
        plan = base.model_copy(update={"blocks": _policies(problem, solution)})
        trace = trace_step(planning.network, plan, planning.recipe)
        misjudged = trace.peak_bytes - solution.peak_bytes
        fits = trace.peak_bytes <= limit_bytes
        if fits:
            best = Candidate(plan, trace, step_s)
            if limit_bytes - trace.peak_bytes <= GOOD_ENOUGH * limit_bytes or misjudged >= 0:
                break
        solution = cheapest(problem, limit_bytes - misjudged - (0 if fits else MIB))
    return best


def _first_solution(problem: Problem, limit_bytes: int) -> Solution | None:
    """The program sees peaks that are slightly too large, so where it finds nothing it is asked again with a little more."""
    for allowance in ALLOWANCES:
        solution = cheapest(problem, int((1 + allowance) * limit_bytes))
        if solution is not None:
            return solution
    return None


def _problem(planning: Planning, base: Plan, trace: StepTrace, placement: Placement) -> Problem:
    """The program's figures, with the optimizer's state and the gradients where the placement has them."""
    moved = optimizer_bytes(planning.named, placement) - optimizer_bytes(planning.named, "device")
    paths = usable_blocks(trace)
    later = _later_gradients(planning, paths) if placement.endswith("backward") else dict.fromkeys(paths, 0)
    terms = [
        BlockTerm(
            path,
            options,
            trace.blocks[path].forward_start + moved,
            trace.blocks[path].backward_start + moved - later[path],
        )
        for path, options in zip(paths, planning.block_options(base))
    ]
    step_s = seconds(trace.ops, planning.spec)
    forward_s = seconds(trace.ops[: trace.num_forward_ops], planning.spec)
    hidden_bytes = int(LINK_SHARE * forward_s * planning.spec.host_link)
    host_limit = max(0, planning.ram_bytes - _host_state_bytes(planning, placement))
    return Problem(
        terms,
        trace.elsewhere_forward_peak + moved,
        hidden_bytes,
        host_limit,
        2 * link_seconds(1, planning.spec),
        step_s,
    )


def _host_state_bytes(planning: Planning, placement: Placement) -> int:
    """AdamW's moments, where they live in host memory."""
    return sum(2 * p.nbytes for p in planning.named.values()) if placement.startswith("host") else 0


def _later_gradients(planning: Planning, paths: list[str]) -> dict[str, int]:
    """Bytes of gradients that the optimizer in the backward pass has freed when a block's backward starts."""
    sizes = {
        path: sum(p.nbytes for p in planning.network.blocks[path].parameters() if p.requires_grad) for path in paths
    }
    last_to_first, freed, result = list(reversed(paths)), 0, {}
    for path in last_to_first:
        result[path] = freed
        freed += sizes[path]
    return result


def _placements(planning: Planning) -> list[Placement]:
    """Cheapest first. In the backward pass only where no step needs all gradients at once, and only over whole batches."""
    everything_at_once = planning.recipe.optimizer.clip_norm is not None or planning.amp == "fp16"
    accumulates = planning.recipe.batch.num_atoms > 1
    return ["device", "host"] if everything_at_once or accumulates else ["device", "backward", "host_backward"]


def _placement_seconds(planning: Planning, placement: Placement) -> float:
    return IN_BACKWARD_S if placement.endswith("backward") else 0.0


def _step_seconds(planning: Planning, trace: StepTrace, plan: Plan, extra_s: float) -> float:
    """Forward and backward passes of every part, and the update."""
    num_parts = -(-planning.recipe.batch.size // plan.micro_batch)
    traced_parts = min(2, num_parts)
    num_parameters = sum(p.numel() for p in planning.named.values())
    update_s = optimizer_seconds(num_parameters, plan.optimizer, planning.spec) + _placement_seconds(
        planning, plan.optimizer
    )
    average_s = ema_seconds(ema_bytes(planning.network.model, planning.recipe.ema), planning.spec)
    return num_parts * (seconds(trace.ops, planning.spec) / traced_parts + extra_s) + update_s + average_s


def _policies(problem: Problem, solution: Solution) -> dict:
    """Policies by block. Where one offloads, all are named: each tells the host store when it begins."""
    offloads = any(option.policy.offloads for option in solution.chosen)
    return {
        block.path: option.policy
        for block, option in zip(problem.blocks, solution.chosen)
        if offloads or option.policy != KEEP_ALL
    }


def _finished(planning: Planning, candidate: Candidate, baseline_s: float, limit_bytes: int) -> Plan:
    """The plan with its evaluation batch, prediction and reasons."""
    steps = max(1, planning.num_train // planning.recipe.batch.size)
    held = _host_state_bytes(planning, candidate.plan.optimizer)
    prediction = Prediction(
        peak=candidate.trace.breakdown,
        host_bytes=candidate.trace.host_bytes + held,
        step_s=candidate.step_s,
        epoch_s=candidate.step_s * steps,
        baseline_step_s=baseline_s,
        time_source="roofline",
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
    base = planning.base_plan(_micro_batches(planning)[-1])
    trace = planning.trace(base)
    smallest = float("inf")
    for placement in _placements(planning):
        problem = _problem(planning, base, trace, placement)
        solution = leanest(problem)
        if solution is not None:
            plan = base.model_copy(update={"optimizer": placement, "blocks": _policies(problem, solution)})
            smallest = min(smallest, trace_step(planning.network, plan, recipe).peak_bytes)
    taken = planning.budget.total_bytes - planning.budget.tensor_bytes
    needed = 1.02 * (smallest + taken)
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


def _spec_of(plan: Plan) -> DeviceSpec:
    import torch

    from lowmem.planning.devices import device_spec

    return device_spec(torch.device(plan.device))


def with_budget(planning: Planning, spec: DeviceSpec, vram_bytes: int) -> Planning:
    """The same planning, with all its traces, under another budget."""
    other = replace(
        planning,
        budget=budget_for(spec, vram_bytes, planning.device),
        traces=planning.traces,
        options=planning.options,
        rungs=planning.rungs,
    )
    other.network = planning.network
    return other
