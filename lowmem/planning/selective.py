"""Choices of `selective` recomputation: which outputs of a block's convolutions, products and attention calls are kept, and where."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowmem.memory.activations import KEEPABLE_OPS, _Keep, _Kept
from lowmem.memory.offload import MIN_OFFLOAD_BYTES
from lowmem.planning.figures import Figures, inputs_of
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Plan
from lowmem.planning.timing import Clock
from lowmem.planning.trace import BlockMoments
from lowmem.training.step import autocast

MAX_SUBSET_SIZE = 7
"""Blocks with more outputs than this get the subsets of a greedy order only."""
KEEPABLE_NAMES = {str(op) for op in KEEPABLE_OPS}


@dataclass(frozen=True)
class Keepable:
    """One output that `selective` may keep."""

    ordinal: int
    num_bytes: int
    recompute_s: float


@dataclass(frozen=True)
class Choice:
    """Outputs that are kept; those among them that are in host memory."""

    kept: tuple[Keepable, ...]
    hosted: tuple[Keepable, ...]


def selective_choices(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, none: Figures, clock: Clock, offload: bool
) -> list[Choice]:
    subsets = _subsets(_keepables(network, path, moments, plan, none, clock))
    return [
        Choice(subset, subset[:count]) for subset in subsets for count in (range(len(subset) + 1) if offload else (0,))
    ]


def _subsets(keepables: list[Keepable]) -> list[tuple[Keepable, ...]]:
    """Subsets worth a look, each with its largest output first."""
    ranked = sorted(keepables, key=lambda item: -item.recompute_s / item.num_bytes)
    if len(ranked) > MAX_SUBSET_SIZE:
        found = [tuple(ranked[:count]) for count in range(1, len(ranked) + 1)]
    else:
        found = [subset for count in range(1, len(ranked) + 1) for subset in combinations(ranked, count)]
    return [tuple(sorted(subset, key=lambda item: -item.num_bytes)) for subset in found]


def _keepables(
    network: FakeNetwork, path: str, moments: BlockMoments, plan: Plan, none: Figures, clock: Clock
) -> list[Keepable]:
    """Outputs that stay as they are until the block ends, with their bytes and what it costs to make them again."""
    every = set(range(sum(op.name in KEEPABLE_NAMES for op in none.forward_ops)))
    kept: dict[int, Any] = {}
    with network.fake(), torch.no_grad(), autocast(plan), _Keep(every, set(), kept, None):
        args, kwargs = inputs_of(moments)
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
