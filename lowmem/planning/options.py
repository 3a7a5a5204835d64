"""What each block can do with its activations, in bytes and seconds: its options, without those that another one beats.

Blocks that are the same are traced once. Two or three short traces of a block (what it saves, and what each of it costs to make again;
nothing made again; everything) give the figures of every choice by addition: each saved tensor is held, made again, or sent to host memory.
Where that cannot reach what running the whole block again does, `selective` and `full` recomputation are options too (selective.py).
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowmem.planning.figures import Figures, SavedTensor, saved_tensors, traced
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import KEEP_ALL, RECOMPUTE_ALL, STEM, BlockPolicy, Plan
from lowmem.planning.selective import Choice, selective_choices
from lowmem.planning.timing import Clock
from lowmem.planning.trace import BlockMoments

MAX_HOST_LEVELS = 5
"""Amounts of a block's saved tensors that may be held in host memory, from some to all."""
MIN_TENSOR_FRAC = 0.01
"""Of what a block saves: smaller tensors are left where they are."""
OUT_OF_REACH_FRAC = 0.03
"""Of what a block saves: where more than this (and its inputs) is left when all that can be made again is, it may be run again whole."""
MIN_STEP_FRAC = 0.04
"""Of what a block saves: two choices of what is made again differ by at least this."""


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


def block_options(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, clock: Clock, copy_s: float | None
) -> list[Option]:
    """The Pareto set of a block's options; the first keeps everything. `copy_s`: what a byte in host memory costs the kernels behind which it travels there and
    back; None: no host memory."""
    none = traced(network, path, moments, plan, KEEP_ALL)
    saved = [
        tensor
        for tensor in saved_tensors(network, path, moments, plan, clock)
        if tensor.num_bytes >= MIN_TENSOR_FRAC * none.kept
    ]
    makeable = [tensor for tensor in saved if tensor.again_s is not None]
    lean = traced(network, path, moments, plan, _again(makeable)) if makeable else none
    options = [_option(KEEP_ALL, none, 0.0)]
    for again in _prefixes(makeable):
        rest = [tensor for tensor in saved if tensor not in again]
        levels = _levels(len(rest)) if copy_s is not None else [0]
        options += [_mixed(again, rest[:count], makeable, none, lean, copy_s or 0.0) for count in levels]
    if path != STEM and lean.kept > _input_bytes(moments) + OUT_OF_REACH_FRAC * none.kept:
        options += _recomputing(network, path, moments, plan, none, clock, copy_s)
    return _pareto(options)


def _recomputing(
    network: FakeNetwork,
    path: str,
    moments: BlockMoments,
    plan: Plan,
    none: Figures,
    clock: Clock,
    copy_s: float | None,
) -> list[Option]:
    """Options that run the whole block again."""
    full, forward_s = traced(network, path, moments, plan, RECOMPUTE_ALL), clock.seconds(none.forward_ops)
    choices = selective_choices(network, path, moments, plan, none, clock, copy_s is not None)
    return [
        _option(RECOMPUTE_ALL, full, forward_s),
        *(_selective(choice, full, forward_s, copy_s or 0.0) for choice in choices),
    ]


def _input_bytes(moments: BlockMoments) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves((moments.args, moments.kwargs)) if isinstance(leaf, Tensor))


def _again(tensors: list[SavedTensor]) -> BlockPolicy:
    return BlockPolicy(again=tuple(sorted(tensor.ordinal for tensor in tensors)))


def block_signature(block: nn.Module, moments: BlockMoments) -> str:
    """Equal for blocks that cost the same: the same modules on inputs of the same shape."""
    inputs = [
        (tuple(t.shape), t.stride(), t.dtype)
        for t in tree_leaves((moments.args, moments.kwargs))
        if isinstance(t, Tensor)
    ]
    return f"{block!r}{inputs}"


def _option(policy: BlockPolicy, figures: Figures, extra_s: float) -> Option:
    return Option(
        policy, figures.kept, figures.forward_held, figures.forward_peak, figures.backward_peak, figures.host, extra_s
    )


def _selective(choice: Choice, full: Figures, forward_s: float, copy_s: float) -> Option:
    """Full recomputation, less the outputs that are kept."""
    kept = sum(item.num_bytes for item in choice.kept if item not in choice.hosted)
    host = sum(item.num_bytes for item in choice.hosted)
    policy = BlockPolicy(
        recompute="selective",
        keep=tuple(sorted(item.ordinal for item in choice.kept)),
        host=tuple(sorted(item.ordinal for item in choice.hosted)) if choice.hosted else "none",
    )
    return Option(
        policy,
        full.kept + kept,
        full.forward_held + kept,
        full.forward_peak + kept + host,
        full.backward_peak - kept,
        host,
        forward_s - sum(item.recompute_s for item in choice.kept) + host * copy_s,
    )


def _mixed(
    again: list[SavedTensor],
    hosted: list[SavedTensor],
    makeable: list[SavedTensor],
    none: Figures,
    lean: Figures,
    copy_s: float,
) -> Option:
    """Some of what is saved made again, some held in host memory. At no moment of the backward pass is more there than if all had
    been kept; what is in host memory is back before it."""
    again_bytes, host = _sum(again), _sum(hosted)
    ordinals = tuple(sorted(tensor.ordinal for tensor in hosted))
    return Option(
        _again(again).model_copy(update={"host": ordinals or "none"}),
        none.kept - again_bytes - host,
        none.forward_held - again_bytes - host,
        min(none.forward_peak, lean.forward_peak + _sum(makeable) - again_bytes),
        none.backward_peak + again_bytes + host,
        host,
        sum(tensor.again_s or 0.0 for tensor in again) + host * copy_s,
    )


def _sum(tensors: list[SavedTensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)


def _prefixes(makeable: list[SavedTensor]) -> list[list[SavedTensor]]:
    """Nothing, and more and more of what can be made again, the cheapest bytes first."""
    ranked = sorted(makeable, key=lambda tensor: ((tensor.again_s or 0.0) / tensor.num_bytes, tensor.ordinal))
    found: list[list[SavedTensor]] = [[]]
    for count in range(1, len(ranked) + 1):
        if count == len(ranked) or _sum(ranked[:count]) - _sum(found[-1]) >= MIN_STEP_FRAC * _sum(ranked):
            found.append(ranked[:count])
    return found


def _levels(num_saved: int) -> list[int]:
    """How many of the saved tensors to send away: none, and at most `MAX_HOST_LEVELS` numbers up to all of them."""
    step = max(1, -(-num_saved // MAX_HOST_LEVELS))
    return sorted({0, *range(step, num_saved, step), num_saved})


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
