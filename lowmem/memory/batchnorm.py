"""Batch-norm statistics that neither recomputation nor accumulation disturbs.

Recomputing a block runs its batch norms a second time; with momentum 0 and no batch counter the second run leaves the
statistics bit for bit as they are (pytorch #96136 is the bug that this avoids).

A step of K atoms ends with r <- (1 - m) r + m mean_k(batch statistics), whatever the order of the atoms: atom k of K (from 1)
uses the momentum (m / K) / (1 - m + m k / K), and the product of the remainders telescopes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def batchnorms(module: nn.Module) -> list[Any]:
    """Layers with running statistics, anywhere inside: batch norms, and what follows their pattern (timm's EvoNorm-B)."""
    return [m for m in module.modules() if m._buffers.get("running_var") is not None and hasattr(m, "momentum")]


def has_live_batchnorm(model: nn.Module) -> bool:
    """Whether any norm looks across the images of a batch when the model trains."""
    return any(m.training for m in batchnorms(model) if not isinstance(m, _InstanceNorm)) or any(
        isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules()
    )


@contextmanager
def recomputing(norms: list[Any]) -> Iterator[None]:
    """Context: running these batch norms changes no statistic of theirs."""
    held = [(norm, norm.momentum, norm._buffers.get("num_batches_tracked")) for norm in norms if norm.training]
    for norm, _, counter in held:
        norm.momentum = 0.0
        if counter is not None:
            norm._buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        for norm, momentum, counter in held:
            norm.momentum = momentum
            if counter is not None:
                norm._buffers["num_batches_tracked"] = counter


class AtomStatistics:
    """Sets each batch norm's momentum for the atoms of a step; one atom a step leaves it untouched."""

    def __init__(self, model: nn.Module, num_atoms: int) -> None:
        self.num_atoms = num_atoms
        norms = batchnorms(model) if num_atoms > 1 else []
        self.momenta = [(norm, float(norm.momentum)) for norm in norms if norm.momentum is not None]

    def begin_atom(self, atom: int) -> None:
        """`atom` counts from 0 in the order in which the atoms run."""
        for norm, momentum in self.momenta:
            norm.momentum = atom_momentum(momentum, atom + 1, self.num_atoms)

    def end_step(self) -> None:
        for norm, momentum in self.momenta:
            norm.momentum = momentum


def atom_momentum(momentum: float, k: int, num_atoms: int) -> float:
    """Momentum of the k-th of `num_atoms` atoms, k from 1."""
    return (momentum / num_atoms) / (1 - momentum + momentum * k / num_atoms)


class StatisticsBackup:
    """The statistics as they were before a step, for taking back a step that failed."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers: list[Tensor] = [buffer for norm in batchnorms(model) for buffer in norm.buffers(recurse=False)]
        self.copies = [buffer.clone() for buffer in self.buffers]

    def take(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    def restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
