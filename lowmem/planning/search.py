"""The cheapest plan under one limit: the program of solve.py for each placement and micro-batch, its answer traced as a whole."""

from dataclasses import dataclass
from itertools import accumulate

from lowmem.planning.known import Planning, host_state_bytes, usable_units
from lowmem.planning.options import Option
from lowmem.planning.plan import KEEP_ALL, STEM, Placement, Plan
from lowmem.planning.program import BlockTerm, Problem
from lowmem.planning.solve import Solution, cheapest, least_extra_s
from lowmem.planning.timing import ema_seconds, link_seconds, optimizer_seconds
from lowmem.planning.trace import StepTrace, optimizer_bytes, trace_step
from lowmem.sizes import MIB
from lowmem.training.ema import ema_bytes

MAX_TRIES = 4
GOOD_ENOUGH = 0.016
"""A plan that leaves this share of the limit unused is not improved further."""
ALLOWANCES = (0.0, 0.01, 0.04)
"""How far above the limit, as a share of it, a mix may be in the program's eyes and still be traced."""
LINK_SHARE = 0.9
"""How much of the kernels' time the link is expected to work; for what does not fit, the device waits."""
IN_BACKWARD_S = 3e-4
"""What the many small updates of the optimizer in the backward pass add to a step."""


@dataclass(frozen=True)
class Candidate:
    """A whole plan that was traced and fits."""

    plan: Plan
    trace: StepTrace
    step_s: float


def cheapest_within(planning: Planning, limit_bytes: int) -> Candidate | None:
    found = [
        candidate
        for micro_batch in micro_batches(planning)
        if (candidate := _best_of(planning, micro_batch, limit_bytes))
    ]
    return min(found, key=lambda item: item.step_s, default=None)


def micro_batches(planning: Planning) -> list[int]:
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
    for placement in placements(planning):
        plan = base.model_copy(update={"optimizer": placement})
        program = problem(planning, base, trace, placement)
        extra_s = least_extra_s(program, int((1 + ALLOWANCES[-1]) * limit_bytes))
        if extra_s is not None:
            drafts.append((step_seconds(planning, plan, extra_s), plan, program))
    best: Candidate | None = None
    for bound_s, plan, program in sorted(drafts, key=lambda draft: draft[0]):
        if best is None or bound_s < best.step_s:
            found = _fitted(planning, plan, program, limit_bytes)
            best = found if found is not None and (best is None or found.step_s < best.step_s) else best
    return best


def _fitted(planning: Planning, base: Plan, program: Problem, limit_bytes: int) -> Candidate | None:
    """Trace the program's answer as a whole, and tighten or relax its limit by what it misjudged."""
    best: Candidate | None = None
    solution = _first_solution(program, limit_bytes)
    for _ in range(MAX_TRIES):
        if solution is None:
            break
        step_s = step_seconds(planning, base, solution.extra_s)
        if best is not None and step_s >= best.step_s:
            break
        plan = base.model_copy(update={"blocks": policies(program, solution)})
        trace = trace_step(planning.network, plan, planning.recipe)
        misjudged = trace.peak_bytes - solution.peak_bytes
        fits = trace.peak_bytes <= limit_bytes
        if fits:
            best = Candidate(plan, trace, step_s)
            if limit_bytes - trace.peak_bytes <= GOOD_ENOUGH * limit_bytes or misjudged >= 0:
                break
        solution = cheapest(program, limit_bytes - misjudged - (0 if fits else MIB))
    return best


def _first_solution(program: Problem, limit_bytes: int) -> Solution | None:
    """The program sees peaks that are slightly too large, so where it finds nothing it is asked again with a little more."""
    for allowance in ALLOWANCES:
        solution = cheapest(program, int((1 + allowance) * limit_bytes))
        if solution is not None:
            return solution
    return None


def problem(planning: Planning, base: Plan, trace: StepTrace, placement: Placement) -> Problem:
    """The program's figures, with the optimizer's state and the gradients where the placement has them; made once."""
    key = base.micro_batch, placement
    if key not in planning.problems:
        planning.problems[key] = _problem(planning, base, trace, placement)
    return planning.problems[key]


def _problem(planning: Planning, base: Plan, trace: StepTrace, placement: Placement) -> Problem:
    moved = optimizer_bytes(planning.named, placement) - optimizer_bytes(planning.named, "device")
    paths = usable_units(trace)
    all_options = planning.block_options(base)
    moved -= _excess(trace, paths, all_options)
    later = _later_gradients(planning, paths) if placement.endswith("backward") else dict.fromkeys(paths, 0)
    terms = [
        BlockTerm(
            path,
            options,
            trace.blocks[path].forward_start + moved,
            trace.blocks[path].backward_start + moved - later[path],
            leaves_s,
            returns_s,
        )
        for path, options, (leaves_s, returns_s) in zip(
            paths, all_options, _link_windows(planning, trace, paths, placement)
        )
    ]
    host_limit = max(0, planning.ram_bytes - host_state_bytes(planning, placement))
    return Problem(
        terms,
        trace.elsewhere_forward_peak + moved,
        host_limit,
        link_seconds(1, planning.spec),
        planning.seconds(base).step_s,
    )


def _excess(trace: StepTrace, paths: list[str], all_options: list[list[Option]]) -> int:
    """By how much the program's figures, from blocks that ran alone, overstate the peak of the unconstrained step, which is known."""
    moments = [trace.blocks[path] for path in paths]
    peaks = [
        max(m.forward_start + options[0].forward_peak, m.backward_start + options[0].backward_peak)
        for m, options in zip(moments, all_options)
    ]
    return max(0, max([trace.elsewhere_forward_peak, *peaks]) - trace.peak_bytes)


def _link_windows(
    planning: Planning, trace: StepTrace, paths: list[str], placement: Placement
) -> list[tuple[float, float]]:
    """`leaves_s` and `returns_s` of each block: what it sends is released when the second block after it starts, and fetched when
    the backward pass of the block after it starts."""
    passed = list(accumulate((planning.clock.op_seconds(op) for op in trace.ops), initial=0.0))
    moments = [trace.blocks[path] for path in paths]
    starts = [passed[m.forward_op] for m in moments] + 2 * [passed[trace.num_forward_ops]]
    ends = [passed[m.backward_op] for m in moments]
    behind = [
        before_s - end_s - _moments_seconds(planning, path, placement)
        for before_s, end_s, path in zip(ends, ends[1:], paths[1:])
    ]
    return [
        (LINK_SHARE * start_s, LINK_SHARE * max(0.0, behind_s)) for start_s, behind_s in zip(starts[2:], [*behind, 0.0])
    ]


def _moments_seconds(planning: Planning, path: str, placement: Placement) -> float:
    """How long the link is taken by the optimizer's state of a block, one way."""
    if placement != "host_backward":
        return 0.0
    return link_seconds(2 * _trained_bytes(planning, path), planning.spec)


def _trained_bytes(planning: Planning, path: str) -> int:
    return 0 if path == STEM else sum(p.nbytes for p in planning.network.blocks[path].parameters() if p.requires_grad)


def _later_gradients(planning: Planning, paths: list[str]) -> dict[str, int]:
    """Bytes of gradients that the optimizer in the backward pass has freed when a block's backward starts."""
    sizes = {path: _trained_bytes(planning, path) for path in paths}
    last_to_first, freed, result = list(reversed(paths)), 0, {}
    for path in last_to_first:
        result[path] = freed
        freed += sizes[path]
    return result


def placements(planning: Planning) -> list[Placement]:
    """Cheapest first. In the backward pass only where no step needs all gradients at once, and only over whole batches."""
    everything_at_once = planning.recipe.optimizer.clip_norm is not None or planning.amp == "fp16"
    accumulates = planning.recipe.batch.num_atoms > 1
    return ["device", "host"] if everything_at_once or accumulates else ["device", "backward", "host_backward"]


def step_seconds(planning: Planning, plan: Plan, extra_s: float) -> float:
    """Forward and backward passes of every part, and the update."""
    num_parts = -(-planning.recipe.batch.size // plan.micro_batch)
    traced_parts = min(2, num_parts)
    num_parameters = sum(p.numel() for p in planning.named.values())
    found = planning.seconds(planning.base_plan(plan.micro_batch))
    update_s = optimizer_seconds(num_parameters, plan.optimizer, planning.spec, found.bound_frac_backward)
    update_s += IN_BACKWARD_S if plan.optimizer.endswith("backward") else 0.0
    average_s = ema_seconds(ema_bytes(planning.network.model, planning.recipe.ema), planning.spec)
    return num_parts * (found.step_s / traced_parts + extra_s) + update_s + average_s


def policies(program: Problem, solution: Solution) -> dict:
    """Policies by block. Where one offloads, all are named, as each tells the host store when it begins; and where the stem has one,
    whose end is the beginning of the first."""
    chosen = {block.path: option.policy for block, option in zip(program.blocks, solution.chosen)}
    if chosen.get(STEM, KEEP_ALL) != KEEP_ALL or any(policy.offloads for policy in chosen.values()):
        return chosen
    return {path: policy for path, policy in chosen.items() if policy != KEEP_ALL}
