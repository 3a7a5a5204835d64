"""The memory of one training step, allocation by allocation: measured on the device, and predicted by the planner's trace.

On a CPU the meter that counts live tensors records them. On CUDA the allocator's own history does, rounding, workspaces and all; its
snapshot is kept as the pickle that pytorch.org/memory_viz opens. Labels are PHASE:BLOCK, or what a tensor is for.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory.census import category, naming_gradients
from lowmem.memory.limit import NUM_COUNTED
from lowmem.memory.meter import Allocation, MemoryMeter, Timeline
from lowmem.phases import current_phase, timing_phases
from lowmem.planning.blocks import find_blocks
from lowmem.planning.plan import Plan
from lowmem.recipe import Recipe
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model

MAX_ENTRIES = 1_000_000


def measured_timeline(recipe: Recipe, plan: Plan, num_classes: int, snapshot: Path) -> Timeline:
    """One step of the recipe under the plan, after the steps that libraries and counting need."""
    model, _ = initialised_model(recipe.model, num_classes, recipe.seed)
    engine = Engine(model, recipe, plan, torch.ones(num_classes, dtype=torch.int64))
    device_input = DeviceInput(
        Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, plan.memory_format, recipe.mixup, recipe.seed
    )
    batches = random_batches(recipe, num_classes, 1)

    def step(number: int) -> None:
        engine.train_step(batches[0], device_input, 1, number, 0.0)

    try:
        kind = device_input.is_mixed(1, 0)
        alike = [number for number in range(200) if device_input.is_mixed(1, number) == kind]
        for number in alike[: NUM_COUNTED + 1]:
            step(number)
        gc.collect()
        if engine.device.type == "cuda":
            return _on_card(engine, step, snapshot)
        return _on_cpu(engine, step)
    finally:
        engine.close()


class _Place:
    """The block that runs."""

    block = ""

    @property
    def label(self) -> str:
        return f"{current_phase()}:{self.block}" if self.block else current_phase()


@contextmanager
def _following_blocks(model: nn.Module, place: _Place, tell: Any = lambda: None) -> Iterator[None]:
    """Context: `place` knows the block whose forward or backward pass runs; `tell` is called when it changes."""

    def at(path: str) -> None:
        place.block = path
        tell()

    def forward_ends(path: str, output: Any) -> None:
        at("")
        tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda grad: at(path))

    hooks = []
    for path, block in find_blocks(model).items():
        hooks.append(block.register_forward_pre_hook(lambda module, args, path=path: at(path)))
        hooks.append(block.register_forward_hook(lambda module, args, output, path=path: forward_ends(path, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _PlacedMeter(MemoryMeter):
    def __init__(self, place: _Place) -> None:
        super().__init__(record=True)
        self.place = place

    def _record(self, address: int, num_bytes: int) -> None:
        given, self.label = self.label, self.label or self.place.label
        super()._record(address, num_bytes)
        self.label = given


def _on_cpu(engine: Engine, step: Any) -> Timeline:
    place = _Place()
    meter = _PlacedMeter(place)
    for label, tensors in engine.resident().items():
        meter.adopt(tensors, label)
    with _following_blocks(engine.model, place), naming_gradients(meter, engine.model.parameters()), meter:
        step(0)
    assert meter.timeline is not None
    return until(meter.timeline, meter.timeline.clock)


class _Labels:
    """Stands where a clock of phases does: names the phase to the allocator, in the thread that runs it."""

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.set = getattr(torch.cuda.memory, "_set_memory_metadata", lambda label: None)

    def mark(self, name: str) -> None:
        self.tell()

    def tell(self) -> None:
        self.set(self.place.label)


def _on_card(engine: Engine, step: Any, snapshot: Path) -> Timeline:
    place, grads = _Place(), set()
    labels = _Labels(place)
    resident = {name: sum(t.untyped_storage().nbytes() for t in ts) for name, ts in engine.resident().items()}
    base = torch.cuda.memory_allocated(engine.device)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: grads.add(p.grad.data_ptr()) if p.grad is not None else None)
        for p in engine.model.parameters()
        if p.requires_grad
    ]
    torch.cuda.synchronize(engine.device)
    torch.cuda.memory._record_memory_history("all", stacks="python", max_entries=MAX_ENTRIES)
    try:
        with _following_blocks(engine.model, place, labels.tell), timing_phases(labels):  # type: ignore[arg-type]
            step(0)
        torch.cuda.synchronize(engine.device)
        torch.cuda.memory._dump_snapshot(str(snapshot))
        found = torch.cuda.memory._snapshot()["device_traces"][engine.device.index or 0]
    finally:
        torch.cuda.memory._record_memory_history(None)
        labels.set("")
        for hook in hooks:
            hook.remove()
    resident["workspace"] = max(0, base - sum(resident.values()))
    return timeline_of_snapshot(found, resident, grads)


def timeline_of_snapshot(entries: Sequence[dict[str, Any]], resident: dict[str, int], grads: set[int]) -> Timeline:
    """The allocator's history of a step on top of what was there before it; `grads`: addresses of gradients."""
    timeline = Timeline()
    for label, num_bytes in resident.items():
        timeline.clock += 1
        timeline.allocations.append(Allocation(num_bytes, label, timeline.clock))
    for entry in entries:
        action, address = entry["action"], entry.get("addr", 0)
        if action == "alloc":
            timeline.clock += 1
            item = Allocation(entry["size"], entry.get("user_metadata") or "step", timeline.clock)
            if address in grads and item.label.startswith(("backward", "step")):
                item.label = "gradients"
            timeline.allocations.append(item)
            timeline.live_now[address] = item
        elif action == "free_completed" and address in timeline.live_now:
            timeline.clock += 1
            timeline.live_now.pop(address).died = timeline.clock
    return timeline


def until(timeline: Timeline, clock: int) -> Timeline:
    """The part of a timeline up to a time."""
    kept = [item for item in timeline.allocations if item.born <= clock]
    ended = [replace(item, died=None) if item.died is not None and item.died > clock else item for item in kept]
    return Timeline(ended, {}, clock)


def label_category(label: str) -> str:
    return category(label.partition(":")[0])


def curve(timeline: Timeline, wanted: str | None = None) -> list[int]:
    """Live bytes at each time, of one category or of all."""
    changes = [0] * (timeline.clock + 2)
    for item in timeline.allocations:
        if wanted is None or label_category(item.label) == wanted:
            changes[item.born] += item.num_bytes
            if item.died is not None:
                changes[item.died] -= item.num_bytes
    live, found = 0, []
    for change in changes[:-1]:
        live += change
        found.append(live)
    return found


def landmarks(timeline: Timeline) -> list[int]:
    """Times at which inputs, the forward and the backward pass begin, and the end."""
    phases = [item.label.partition(":")[0] for item in timeline.allocations]
    borns = [item.born for item in timeline.allocations]

    def first(*names: str) -> int:
        return next((born for born, name in zip(borns, phases) if name in names), timeline.clock)

    inputs, forward = first("inputs", "copy"), first("forward")
    backward = next(
        (b for b, name in zip(borns, phases) if b > forward and name in ("backward", "recomputation")), timeline.clock
    )
    return [0, inputs, forward, backward, timeline.clock]


def passes(timeline: Timeline) -> list[tuple[int, int]]:
    """Times at which the forward and the backward pass of each part of the batch begin."""
    found: list[list[int]] = []
    for item in timeline.allocations:
        name = item.label.partition(":")[0]
        if name == "forward" and (not found or len(found[-1]) == 2):
            found.append([item.born])
        if name in ("backward", "recomputation") and found and len(found[-1]) == 1:
            found[-1].append(item.born)
    return [(first, (*rest, timeline.clock)[0]) for first, *rest in found]


def alike(predicted: Timeline, measured: Timeline) -> list[tuple[list[int], list[int]]]:
    """Stretches of the predicted timeline and those of the measured one that they stand for: the trace runs a step's first and last part."""
    own, other = passes(predicted), passes(measured)
    starts = landmarks(predicted)[1] - 1, landmarks(measured)[1] - 1
    if len(own) == 1 or len(other) == 1:
        return [([starts[0], *own[0], predicted.clock], [starts[1], *other[0], measured.clock])]
    first = [starts[0], *own[0], own[1][0]], [starts[1], *other[0], other[1][0]]
    return [first, ([*own[-1], predicted.clock], [*other[-1], measured.clock])]


def by_block_at_peak(timeline: Timeline) -> dict[str, int]:
    """Activations that are live at the peak, by the block that made them; "" is outside of all."""
    found: dict[str, int] = {}
    for item in timeline.live_at(timeline.peak_time()):
        if label_category(item.label) == "activations":
            block = item.label.partition(":")[2]
            found[block] = found.get(block, 0) + item.num_bytes
    return found
