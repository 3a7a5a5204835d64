"""One training step on fake tensors: the exact peak of a plan, and what each block holds when.

The step that is traced is the one that is run (training/step.py, with the real policies); only the optimizer's arithmetic is left out,
which allocates nothing, and its state is one tensor of the same size. Fake tensors live on the CPU, since fake CUDA tensors
cannot run backward without a card.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.memory.activations import apply_policies
from lowmem.memory.batchnorm import StatisticsBackup
from lowmem.memory.host_optimizer import staging_sizes
from lowmem.memory.meter import MemoryMeter, Timeline, host_memory
from lowmem.planning.cost import OpCost, op_cost
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import STEM, MemoryBreakdown, Placement, Plan
from lowmem.recipe import MixupRecipe, Recipe
from lowmem.training.ema import ema_bytes
from lowmem.training.objective import Objective
from lowmem.training.step import TrainStep, autocast

NORM = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Scratch = Callable[[Any, Any, dict[str, Any]], int]
"""Bytes that the kernel of an operation on these arguments allocates and frees again."""
CATEGORIES = {"forward": "activations", "backward": "workspace"}


@dataclass
class BlockMoments:
    """Live bytes when a block starts, and the most while it runs, in both directions; `args` is how it was called. The passes begin
    with operations number `forward_op` and `backward_op` of the step."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    num_calls: int = 0
    forward_start: int = 0
    forward_peak: int = 0
    backward_start: int = 0
    backward_peak: int = 0
    forward_op: int = 0
    backward_op: int = 0


@dataclass
class StepTrace:
    """What one traced step showed. `elsewhere_peak` is the most while no block was running."""

    peak_bytes: int
    breakdown: MemoryBreakdown
    blocks: dict[str, BlockMoments]
    """By path; by "" what ran before the first block."""
    order: list[str]
    elsewhere_forward_peak: int
    elsewhere_backward_peak: int
    ops: list[OpCost]
    num_forward_ops: int
    """The first of `ops`, up to the first block's backward pass."""
    host_bytes: int
    timeline: Timeline
    num_timeline_events: int
    """Of the step; what the timeline saw later is the end of the fake tensors themselves."""


class StepRecorder(MemoryMeter):
    """A meter that also notes what each operation costs; `scratch` says what its kernel allocates and frees again, where that
    is known."""

    def __init__(self, scratch: Scratch | None = None) -> None:
        super().__init__(record=True)
        self.ops: list[OpCost] = []
        self.scratch = scratch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        cost = op_cost(func, args, kwargs, result)
        if cost is not None:
            self.ops.append(cost)
            self.add_scratch(func, args, kwargs or {})
        return result

    def add_scratch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """What the kernel of an operation that has just run had allocated in between."""
        if self.scratch is not None:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + self.scratch(func, args, kwargs))


class TracedOptimizer:
    """Stands for an optimizer: its memory and the moment at which gradients go, without its arithmetic."""

    def __init__(self, model: nn.Module, placement: Placement, meter: StepRecorder) -> None:
        self.placement, self.meter, self.armed = placement, meter, False
        self.behind: Tensor | None = None
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.state = torch.empty(optimizer_bytes(self.named, placement), dtype=torch.uint8)
        self.hooks = [p.register_post_accumulate_grad_hook(self._grad_is_complete) for p in self.named.values()]

    def arm(self) -> None:
        self.armed = True

    def update(self, scaler: Any, clip_norm: float | None) -> None:
        self.meter.add_scratch(torch.ops.aten._fused_adamw_.default, (), {})
        for parameter in self.named.values():
            parameter.grad = None

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _grad_is_complete(self, parameter: Tensor) -> None:
        assert parameter.grad is not None and self.meter.timeline is not None
        item = self.meter.timeline.live_now.get(parameter.grad.untyped_storage()._cdata)
        if item is not None:
            item.label = "gradients"
        if self.placement == "backward" and self.armed:
            parameter.grad = None
        if self.placement == "host_backward" and self.armed:  # one weight behind, as HostOptimizer has it
            if self.behind is not None:
                self.behind.grad = None
            self.behind = parameter


def optimizer_bytes(named: dict[str, Any], placement: Placement) -> int:
    """What a placement of AdamW takes up on the device."""
    num_steps = 4 * len(named)
    if not placement.startswith("host"):
        return num_steps + sum(2 * p.nbytes for p in named.values())
    return num_steps + 4 * sum(staging_sizes(named))


def trace_step(network: FakeNetwork, plan: Plan, recipe: Recipe, scratch: Scratch | None = None) -> StepTrace:
    """Trace the first and the last forward pass of a step under a plan; that is where a step's peak lies."""
    meter = StepRecorder(scratch)
    with network.fake():
        network.training_mode()
        handle = apply_policies(network.model, plan.blocks)
        optimizer = TracedOptimizer(network.model, plan.optimizer, meter)
        backup = StatisticsBackup(network.model)
        objective = Objective(recipe.loss, torch.ones(network.num_classes, dtype=torch.int64), "cpu")
        step = TrainStep(network.model, recipe, plan, objective, optimizer, handle)
        step.parts = step.parts if len(step.parts) < 2 else [step.parts[0], step.parts[-1]]
        watch = _BlockWatch(network, meter)
        meter.adopt(
            [*network.model.parameters(), *network.model.buffers(), *backup.copies, objective.weights_K], "weights"
        )
        meter.adopt([optimizer.state], "optimizer")
        average = torch.empty(ema_bytes(network.model, recipe.ema), dtype=torch.uint8)
        meter.adopt([average], "ema")
        host_batch = _host_batch(recipe)
        try:
            with meter:
                meter.label = "inputs"
                batch = _device_input(recipe, plan).prepare(host_batch, 1, 0)
                meter.label = "forward"
                watch.begin()
                step(batch, 1, 0)
            watch.end()
        finally:
            watch.close()
            optimizer.close()
            handle.remove()
    return watch.result(0 if handle.store is None else handle.store.host_bytes)


def trace_evaluation(network: FakeNetwork, plan: Plan, px: int, batch_size: int) -> int:
    """Peak of a forward pass of evaluation, weights included."""
    meter = MemoryMeter()
    with network.fake(), torch.no_grad():
        network.model.eval()
        meter.adopt([*network.model.parameters(), *network.model.buffers()], "weights")
        images_BHWC = torch.empty(batch_size, px, px, 3, dtype=torch.uint8)
        with meter, autocast(plan):
            network.model(DeviceInput(NORM, torch.device("cpu"), plan.memory_format).images(images_BHWC)).float()
        network.training_mode()
    return meter.peak_bytes


def _device_input(recipe: Recipe, plan: Plan) -> DeviceInput:
    mixup = MixupRecipe(prob=1.0, alpha=recipe.mixup.alpha) if recipe.mixup.prob else None
    return DeviceInput(NORM, torch.device("cpu"), plan.memory_format, mixup, 0)


def _host_batch(recipe: Recipe) -> HostBatch:
    size, px = recipe.batch.size, recipe.data.train_px
    with host_memory():
        labels_B = torch.zeros(size, dtype=torch.int64)
        return HostBatch(torch.empty(size, px, px, 3, dtype=torch.uint8), labels_B, labels_B)


class _BlockWatch:
    """Notes the live bytes and the peaks between the moments at which blocks start and end."""

    def __init__(self, network: FakeNetwork, meter: StepRecorder) -> None:
        self.meter = meter
        self.network = network
        self.moments = {path: BlockMoments() for path in (STEM, *network.blocks)}
        self.order: list[str] = []
        self.elsewhere: Counter[str] = Counter()
        self.current: tuple[str, str] | None = None
        self.peak_bytes = 0
        self.num_forward_ops = 0
        self.hooks: list[Any] = []
        if network.blocks:
            self.hooks.append(
                network.model.register_forward_pre_hook(_bound(self._forward_starts, STEM), with_kwargs=True)
            )
        for path, block in network.blocks.items():
            self.hooks.append(block.register_forward_pre_hook(_bound(self._forward_starts, path), with_kwargs=True))
            self.hooks.append(block.register_forward_hook(_bound(self._forward_ends, path)))

    def begin(self) -> None:
        self._mark(None)

    def end(self) -> None:
        self._mark(None)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def result(self, host_bytes: int) -> StepTrace:
        timeline = self.meter.timeline
        assert timeline is not None
        sums: Counter[str] = Counter()
        for item in timeline.live_at(timeline.peak_time()):
            sums[CATEGORIES.get(item.label, item.label)] += item.num_bytes
        return StepTrace(
            self.peak_bytes,
            MemoryBreakdown(**sums),
            self.moments,
            self.order,
            self.elsewhere["forward"],
            self.elsewhere["backward"],
            self.meter.ops,
            self.num_forward_ops or len(self.meter.ops),
            host_bytes,
            timeline,
            timeline.clock,
        )

    def _mark(self, following: tuple[str, str] | None) -> None:
        """What ran until now reached this peak; `following` (block, direction) runs from now on."""
        peak, live = self.meter.peak_bytes, self.meter.live_bytes
        self.peak_bytes = max(self.peak_bytes, peak)
        if self.current is None:
            self.elsewhere[self.meter.label] = max(self.elsewhere[self.meter.label], peak)
        else:
            path, direction = self.current
            name = f"{direction}_peak"
            setattr(self.moments[path], name, max(getattr(self.moments[path], name), peak))
        if following is not None:
            setattr(self.moments[following[0]], f"{following[1]}_start", live)
            setattr(self.moments[following[0]], f"{following[1]}_op", len(self.meter.ops))
        self.current = following
        self.meter.reset_peak()

    def _forward_starts(self, path: str, args: Any, kwargs: Any) -> None:
        self.meter.label = "forward"
        moments = self.moments[path]
        moments.num_calls += 1
        if self.current == (STEM, "forward") and path != STEM:
            self._stem_ends(path, args, kwargs)
        if moments.num_calls == 1:
            if path != STEM:
                self.order.append(path)
            moments.args, moments.kwargs = (tree_map_only(Tensor, _meta, given) for given in (args, kwargs))
        self._mark((path, "forward"))

    def _stem_ends(self, first: str, args: Any, kwargs: Any) -> None:
        self.network.first_block = first
        self._backward_later(STEM, (args, kwargs))

    def _forward_ends(self, path: str, output: Any) -> None:
        self._mark(None)
        self._backward_later(path, output)

    def _backward_later(self, path: str, output: Any) -> None:
        tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
        if tensor is not None:
            tensor.register_hook(lambda grad: self._backward_starts(path))

    def _backward_starts(self, path: str) -> None:
        self._mark((path, "backward"))
        self.meter.label = "backward"
        self.num_forward_ops = self.num_forward_ops or len(self.meter.ops)


def _bound(action: Any, path: str) -> Any:
    """A module hook that forgets the module, and for forward hooks the arguments too."""
    if action.__name__ == "_forward_starts":
        return lambda module, args, kwargs: action(path, args, kwargs)
    return lambda module, args, output: action(path, output)


def _meta(tensor: Tensor) -> Tensor:
    with host_memory():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
