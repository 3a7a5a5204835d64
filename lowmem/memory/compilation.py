"""Blocks that keep everything, compiled by torch.compile: fused kernels, or with `graphs` also replayed as CUDA graphs.

Only training runs compiled; evaluation, with its other sizes, runs the blocks as they are. Names of parameters and buffers never change.
Fused kernels round differently, so the result is the same up to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowmem.planning.blocks import find_blocks
from lowmem.planning.plan import KEEP_ALL, Compiled, Plan

MODES = {"blocks": "default", "graphs": "reduce-overhead"}


@dataclass
class CompilationHandle:
    """Undoes `apply_compilation`."""

    blocks: list[nn.Module] = field(default_factory=list)
    graphs: bool = False

    def begin_step(self) -> None:
        """What graphs left in their buffers in the last step may be overwritten."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def remove(self) -> None:
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self.blocks.clear()


def apply_compilation(model: nn.Module, plan: Plan, backend: str = "inductor") -> CompilationHandle:
    """Compile the blocks of which the plan recomputes and moves nothing; before their policies are applied."""
    handle = CompilationHandle(graphs=plan.compiled == "graphs")
    if plan.compiled == "none":
        return handle
    for path, block in find_blocks(model).items():
        if plan.policy(path) == KEEP_ALL:
            block.forward = _in_training(block, block.forward, plan.compiled, backend)
            handle.blocks.append(block)
    return handle


def _in_training(block: nn.Module, forward: Callable[..., Any], compiled: Compiled, backend: str) -> Callable[..., Any]:
    mode = MODES[compiled] if backend == "inductor" else None
    fused = torch.compile(forward, dynamic=False, mode=mode, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (fused if block.training and torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run
