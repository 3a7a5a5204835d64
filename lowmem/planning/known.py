"""What is known while a plan is made: the network of fake tensors, its traces, and the options of its blocks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.memory.batchnorm import has_live_batchnorm
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec, settle_amp
from lowmem.planning.measure import measured_times, times_file
from lowmem.planning.network import FakeNetwork
from lowmem.planning.options import Option, block_options, block_signature
from lowmem.planning.plan import STEM, Budget, Exactness, LoaderPlan, Placement, Plan
from lowmem.planning.program import Problem
from lowmem.planning.timing import Clock, hidden_copy_seconds
from lowmem.planning.trace import BlockMoments, StepTrace, trace_step
from lowmem.recipe import Recipe


@dataclass(frozen=True)
class Seconds:
    """A whole step, and the shares of its passes in which kernels wait for the device's memory."""

    step_s: float
    bound_frac_forward: float
    bound_frac_backward: float


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
    clock: Clock | None = None
    """Where seconds come from; by default a roofline of the device's data sheet."""
    network: FakeNetwork | None = None
    traces: dict[tuple[int, Placement], StepTrace] = field(default_factory=dict)
    options: dict[int, list[list[Option]]] = field(default_factory=dict)
    problems: dict[tuple[int, Placement], Problem] = field(default_factory=dict)
    known_seconds: dict[tuple[int, int], Seconds] = field(default_factory=dict)
    rungs: dict[int, Any] = field(default_factory=dict)
    """Plans by their rung of the ladder of limits."""

    def __post_init__(self) -> None:
        self.amp = settle_amp(self.recipe.amp, self.spec)
        self.clock = self.clock or Clock(self.spec)
        self.network = self.network or FakeNetwork(self.recipe, self.num_classes)
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

    def measure(self, plan: Plan, say: Callable[[str], None]) -> None:
        """Take the times of this network's operations from the device; before any option of a block is asked for."""
        trace = self.trace(plan)
        kinds: dict[str, tuple[nn.Module, BlockMoments]] = {}
        for path in usable_blocks(trace):
            kinds.setdefault(
                block_signature(self.network.blocks[path], trace.blocks[path]),
                (self.network.blocks[path], trace.blocks[path]),
            )
        device = torch.device(self.device)
        path = times_file(device, plan.memory_format)
        self.clock = Clock(self.spec, measured_times(kinds, plan, device, path, say=say))

    def seconds(self, plan: Plan) -> Seconds:
        """Of the unconstrained step of a micro-batch, by the clock as it is now."""
        key = plan.micro_batch, id(self.clock)
        if key not in self.known_seconds:
            trace = self.trace(plan)
            forward, backward = trace.ops[: trace.num_forward_ops], trace.ops[trace.num_forward_ops :]
            self.known_seconds[key] = Seconds(
                self.clock.seconds(trace.ops),
                self.clock.bandwidth_bound_frac(forward),
                self.clock.bandwidth_bound_frac(backward),
            )
        return self.known_seconds[key]

    def _copy_seconds(self, plan: Plan) -> float:
        """What a byte that goes to host memory and back takes from the kernels behind which it travels."""
        found = self.seconds(plan)
        return hidden_copy_seconds(1, self.spec, found.bound_frac_forward + found.bound_frac_backward)

    def block_options(self, plan: Plan) -> list[list[Option]]:
        """Options of the stem and each block in forward order, traced once for blocks that are the same."""
        if plan.micro_batch not in self.options:
            trace, known = self.trace(plan), {}
            copy_s = self._copy_seconds(plan) if self.spec.kind == "cuda" else None
            found = []
            for path in usable_units(trace):
                moments = trace.blocks[path]
                signature = path if path == STEM else block_signature(self.network.blocks[path], moments)
                if signature not in known:
                    known[signature] = block_options(self.network, path, moments, plan, self.clock, copy_s)
                found.append(known[signature])
            self.options[plan.micro_batch] = found
        return self.options[plan.micro_batch]


def usable_blocks(trace: StepTrace) -> list[str]:
    """Blocks that run once in a forward pass and have a backward pass, in forward order."""
    return [path for path in trace.order if trace.blocks[path].num_calls == 1 and trace.blocks[path].backward_start]


def usable_units(trace: StepTrace) -> list[str]:
    """What a plan may have a policy for: the stem, where one ran, and the blocks."""
    stem = trace.blocks.get(STEM)
    return [*([STEM] if stem and stem.num_calls == 1 and stem.backward_start else []), *usable_blocks(trace)]


def with_budget(planning: Planning, spec: DeviceSpec, vram_bytes: int) -> Planning:
    """The same planning, with all its traces, under another budget."""
    return replace(planning, budget=budget_for(spec, vram_bytes, planning.device))


def host_state_bytes(planning: Planning, placement: Placement) -> int:
    """AdamW's moments, where they live in host memory."""
    return sum(2 * p.nbytes for p in planning.named.values()) if placement.startswith("host") else 0


def loader_plan(spec: DeviceSpec) -> LoaderPlan:
    """Workers beside the step: all cores but one where a card computes; one where the processor does."""
    cores = usable_cores()
    if spec.kind == "cpu":
        return LoaderPlan(workers=1, torch_threads=cores)
    return LoaderPlan(workers=max(1, min(8, cores - 1)), pin_memory=spec.present)
