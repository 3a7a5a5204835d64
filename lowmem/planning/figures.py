"""One block alone on fake tensors: what a policy holds and when, and what it costs to make each saved tensor again."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem.errors import LowmemError
from lowmem.memory.activations import apply_policies
from lowmem.memory.saved import SavedTensors
from lowmem.planning.cost import OpCost
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.planning.timing import Clock
from lowmem.planning.trace import BlockMoments, StepRecorder
from lowmem.training.step import autocast

MANY = tuple(range(512))
"""Ordinals of everything that a block may save."""


@dataclass(frozen=True)
class Figures:
    """Bytes as in `Option`."""

    kept: int
    forward_held: int
    forward_peak: int
    backward_peak: int
    host: int
    forward_ops: tuple[OpCost, ...]


@dataclass(frozen=True)
class SavedTensor:
    """A storage that a block saves and nobody else holds. `again_s`: what making it again takes; None where it cannot be made."""

    ordinal: int
    num_bytes: int
    again_s: float | None


def saved_tensors(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, clock: Clock
) -> list[SavedTensor]:
    """Largest first; not the block's inputs and outputs, which its neighbours hold."""
    block, meter = network.unit(path), StepRecorder()
    with network.fake():
        args, kwargs = inputs_of(moments)
        saved = SavedTensors(block, BlockPolicy(again=MANY), None)
        with autocast(plan), saved.watching():
            output = block(*args, **kwargs)
        outside = {saved.identity(leaf) for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)}
        found = []
        for identity, ordinal in saved.ordinals.items():
            if identity not in outside | saved.in_parts:
                again_s = _again_seconds(saved, identity, meter, clock)
                found.append(SavedTensor(ordinal, saved.sizes[identity], again_s))
    return sorted(found, key=lambda tensor: -tensor.num_bytes)


def _again_seconds(saved: SavedTensors, identity: int, meter: StepRecorder, clock: Clock) -> float | None:
    """Of its own operations; its arguments have been made before and stay."""
    remade = saved.remade.get(identity)
    if remade is None:
        return None
    before = len(meter.ops)
    try:
        with meter:
            remade.num_uses += 1
            remade.get()
    except LowmemError:
        return None
    return clock.seconds(meter.ops[before:])


def traced(network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, policy: BlockPolicy) -> Figures:
    """Forward and backward pass of one block alone under a policy."""
    block, meter = network.unit(path), StepRecorder()
    with network.fake():
        handle = apply_policies(network.model, {path: policy})
        try:
            args, kwargs = inputs_of(moments)
            meter.adopt([*block.parameters(), *block.buffers()], "weights")
            meter.adopt([leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], "inputs")
            with meter:
                return _measured(block, args, kwargs, plan, meter, handle)
        finally:
            handle.remove()
            for parameter in block.parameters():
                parameter.grad = None


def _measured(block: nn.Module, args: Any, kwargs: Any, plan: Plan, meter: StepRecorder, handle: Any) -> Figures:
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
    return Figures(kept, forward_held, forward_peak, meter.peak_bytes - start - (kept - held), host, forward_ops)


def inputs_of(moments: BlockMoments) -> tuple[Any, Any]:
    """Fake inputs as the block was called with; floating ones are results of an operation, as in the network."""

    def made(meta: Tensor) -> Tensor:
        tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="cpu")
        return tensor.requires_grad_().mul(1.0) if meta.is_floating_point() and torch.is_grad_enabled() else tensor

    return tree_map_only(Tensor, made, moments.args), tree_map_only(Tensor, made, moments.kwargs)
