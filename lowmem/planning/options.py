"""What each block can do with its activations, in bytes and seconds: its options, without those that another one beats.

Blocks that are the same are traced once. Four short traces a block (what can be kept; nothing recomputed; everything
recomputed; everything offloaded) give the figures of every subset of kept outputs by addition.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem.memory.activations import KEEPABLE_OPS, SavedTensors, _Keep, _Kept, apply_policies
from lowmem.memory.offload import MIN_OFFLOAD_BYTES
from lowmem.planning.cost import OpCost
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import KEEP_ALL, RECOMPUTE_ALL, BlockPolicy, Plan
from lowmem.planning.timing import Clock, hidden_copy_seconds
from lowmem.planning.trace import BlockMoments, StepRecorder
from lowmem.training.step import autocast

MAX_SUBSET_SIZE = 7
"""Blocks with more outputs than this get the subsets of a greedy order only."""
MAX_HOST_LEVELS = 5
"""Amounts of a block's saved tensors that may be held in host memory, from some to all."""
KEEPABLE_NAMES = {str(op) for op in KEEPABLE_OPS}


@dataclass(frozen=True)
class Option:
    """A policy and what it means. Bytes are relative to the moment at which the block starts (forward: before its first
    operation; backward: with its gradient of the output and everything it kept).

    `kept` is held until the block's backward pass; `forward_held` also until the end of the forward pass (16-bit weights in
    autocast's cache); `host` waits in host memory; `extra_s` is added to the step.
    """

    policy: BlockPolicy
    kept: int
    forward_held: int
    forward_peak: int
    backward_peak: int
    host: int
    extra_s: float


@dataclass(frozen=True)
class Keepable:
    """One output that `selective` may keep."""

    ordinal: int
    num_bytes: int
    recompute_s: float


@dataclass(frozen=True)
class _Figures:
    kept: int
    forward_held: int
    forward_peak: int
    backward_peak: int
    host: int
    forward_ops: tuple[OpCost, ...]


def block_options(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, clock: Clock, offload: bool
) -> list[Option]:
    """The Pareto set of a block's options, dearest in memory first; the first keeps everything."""
    none = _traced(network, path, moments, plan, KEEP_ALL)
    full = _traced(network, path, moments, plan, RECOMPUTE_ALL)
    forward_s = clock.seconds(none.forward_ops)
    keepables = _keepables(network, path, moments, plan, none, clock)
    options = [_option(KEEP_ALL, none, 0.0), _option(RECOMPUTE_ALL, full, forward_s)]
    for subset in _subsets(keepables):
        options.append(_selective(subset, (), full, forward_s, clock))
        if offload:
            options += [
                _selective(subset, subset[:count], full, forward_s, clock) for count in range(1, len(subset) + 1)
            ]
    if offload:
        saved = _saved(network, path, moments, plan)
        options += [_hosted(saved[:count], none, clock) for count in _levels(len(saved))]
    return _pareto(options)


def block_signature(block: nn.Module, moments: BlockMoments) -> str:
    """Equal for blocks that cost the same: the same modules on inputs of the same shape."""
    inputs = [
        (tuple(t.shape), t.stride(), t.dtype)
        for t in tree_leaves((moments.args, moments.kwargs))
        if isinstance(t, Tensor)
    ]
    return f"{block!r}{inputs}"


def _option(policy: BlockPolicy, figures: _Figures, extra_s: float) -> Option:
    return Option(
        policy, figures.kept, figures.forward_held, figures.forward_peak, figures.backward_peak, figures.host, extra_s
    )


def _selective(
    subset: tuple[Keepable, ...], hosted: tuple[Keepable, ...], full: _Figures, forward_s: float, clock: Clock
) -> Option:
    """Full recomputation, less the outputs that are kept."""
    kept = sum(item.num_bytes for item in subset if item not in hosted)
    host = sum(item.num_bytes for item in hosted)
    policy = BlockPolicy(
        recompute="selective",
        keep=tuple(sorted(item.ordinal for item in subset)),
        host=tuple(sorted(item.ordinal for item in hosted)) if hosted else "none",
    )
    extra_s = forward_s - sum(item.recompute_s for item in subset) + hidden_copy_seconds(2 * host, clock.spec)
    return Option(
        policy,
        full.kept + kept,
        full.forward_held + kept,
        full.forward_peak + kept + host,
        full.backward_peak - kept,
        host,
        extra_s,
    )


def _hosted(items: list[tuple[int, int]], none: _Figures, clock: Clock) -> Option:
    """Nothing recomputed, and some of what is saved held in host memory; it is back before the block's backward pass."""
    host = sum(num_bytes for _, num_bytes in items)
    return Option(
        BlockPolicy(host=tuple(sorted(ordinal for ordinal, _ in items))),
        none.kept - host,
        none.forward_held - host,
        none.forward_peak,
        none.backward_peak + host,
        host,
        hidden_copy_seconds(2 * host, clock.spec),
    )


def _levels(num_saved: int) -> list[int]:
    """How many of the saved tensors to send away: at most `MAX_HOST_LEVELS` numbers up to all of them."""
    step = max(1, -(-num_saved // MAX_HOST_LEVELS))
    return sorted({*range(step, num_saved, step), num_saved} - {0})


def _saved(network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan) -> list[tuple[int, int]]:
    """(ordinal, bytes) of what a block saves and nobody else holds, largest first: not its inputs and outputs."""
    block = network.blocks[path]
    with network.fake():
        args, kwargs = _inputs(moments)
        saved = SavedTensors(block, BlockPolicy(host=()), None)
        with autocast(plan), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            output = block(*args, **kwargs)
    shared = {_address(leaf) for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)}
    sizes = [
        (ordinal, saved.sizes[address])
        for address, ordinal in saved.ordinals.items()
        if address not in shared | saved.in_parts
    ]
    return sorted(sizes, key=lambda item: -item[1])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _subsets(keepables: list[Keepable]) -> list[tuple[Keepable, ...]]:
    """Subsets worth a look, each with its largest output first."""
    ranked = sorted(keepables, key=lambda item: -item.recompute_s / item.num_bytes)
    if len(ranked) > MAX_SUBSET_SIZE:
        found = [tuple(ranked[:count]) for count in range(1, len(ranked) + 1)]
    else:
        found = [subset for count in range(1, len(ranked) + 1) for subset in combinations(ranked, count)]
    return [tuple(sorted(subset, key=lambda item: -item.num_bytes)) for subset in found]


def _pareto(options: list[Option]) -> list[Option]:
    """Without options that another one matches or beats in every figure."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda item: (item.extra_s, item.kept, item.host)):
        if not any(_beats(other, option) for other in kept):
            kept.append(option)
    return kept


def _beats(a: Option, b: Option) -> bool:
    return (
        a.extra_s <= b.extra_s
        and a.kept <= b.kept
        and a.forward_held <= b.forward_held
        and a.host <= b.host
        and a.forward_peak <= b.forward_peak
        and a.kept + a.backward_peak <= b.kept + b.backward_peak
    )


def _keepables(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, none: _Figures, clock: Clock
) -> list[Keepable]:
    """Outputs that stay as they are until the block ends, with their bytes and what it costs to make them again."""
    every = set(range(sum(op.name in KEEPABLE_NAMES for op in none.forward_ops)))
    kept: dict[int, Any] = {}
    with network.fake(), torch.no_grad(), autocast(plan), _Keep(every, set(), kept, None):
        args, kwargs = _inputs(moments)
        network.blocks[path](*args, **kwargs)
    costs = [clock.op_seconds(op) for op in none.forward_ops if op.name in KEEPABLE_NAMES]
    found = []
    for ordinal, tree in kept.items():
        leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, _Kept)]
        unchanged = all(isinstance(leaf.value, Tensor) and leaf.value._version == leaf.version for leaf in leaves)
        num_bytes = sum(leaf.value.nbytes for leaf in leaves if isinstance(leaf.value, Tensor))
        if unchanged and num_bytes >= MIN_OFFLOAD_BYTES:
            found.append(Keepable(ordinal, num_bytes, costs[ordinal]))
    return found


def _traced(network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, policy: BlockPolicy) -> _Figures:
    """Forward and backward pass of one block alone under a policy."""
    block, meter = network.blocks[path], StepRecorder()
    with network.fake():
        handle = apply_policies(network.model, {path: policy})
        try:
            args, kwargs = _inputs(moments)
            meter.adopt([*block.parameters(), *block.buffers()], "weights")
            meter.adopt([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], "inputs")
            with meter:
                return _measured(block, args, kwargs, plan, meter, handle)
        finally:
            handle.remove()
            for parameter in block.parameters():
                parameter.grad = None


def _measured(block: nn.Module, args: Any, kwargs: Any, plan: Plan, meter: StepRecorder, handle: Any) -> _Figures:
    before = meter.live_bytes
    meter.reset_peak()
    with autocast(plan):
        output = next(
            leaf for leaf in tree_leaves(block(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad
        )
        forward_peak = meter.peak_bytes - before
        handle.end_forward()
        forward_held = meter.live_bytes - before
    forward_ops = tuple(meter.ops)
    output_bytes = output.untyped_storage().nbytes()
    grad = torch.empty_like(output)
    edge = GradientEdge(output.grad_fn, output.output_nr)
    held_with_output = meter.live_bytes - before - grad.untyped_storage().nbytes()
    del output
    held = meter.live_bytes - before - grad.untyped_storage().nbytes()
    host = 0 if handle.store is None else handle.store.host_bytes
    start = meter.live_bytes
    meter.reset_peak()
    torch.autograd.backward([edge], [grad])
    handle.end_backward()
    # The output is the next block's input, which every policy of that block keeps.
    kept = held if held == held_with_output else held + output_bytes
    return _Figures(kept, forward_held, forward_peak, meter.peak_bytes - start - (kept - held), host, forward_ops)


def _inputs(moments: BlockMoments) -> tuple[Any, Any]:
    """Fake inputs as the block was called with; floating ones are results of an operation, as in the network."""

    def made(meta: Tensor) -> Tensor:
        tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="cpu")
        return tensor.requires_grad_().mul(1.0) if meta.is_floating_point() and torch.is_grad_enabled() else tensor

    return tree_map_only(Tensor, made, moments.args), tree_map_only(Tensor, made, moments.kwargs)
