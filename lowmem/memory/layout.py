"""Blocks that run in another memory layout than the network: weights and inputs are converted where a region begins and ends.

Convolutions take other kernels in another layout, so sums are formed in another order: the result is the same up to rounding. A
converted input is what the block saves for its backward pass; its gradient is converted back by the same operation.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from lowmem.errors import LowmemError

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class LayoutHandle:
    """Undoes `apply_layouts` but for the layout of the weights."""

    def __init__(self) -> None:
        self.hooks: list[RemovableHandle] = []

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def apply_layouts(model: nn.Module, layouts: dict[str, str]) -> LayoutHandle:
    """Give each named block its layout; what comes after a region must be named too. Raises LowmemError for an unknown block."""
    handle = LayoutHandle()
    for path, name in layouts.items():
        try:
            block = model.get_submodule(path)
        except AttributeError:
            raise LowmemError(
                f"The plan names a block {path!r} that this model does not have: it was made for another model."
            ) from None
        block.to(memory_format=FORMATS[name])
        handle.hooks.append(block.register_forward_pre_hook(partial(_convert, FORMATS[name]), with_kwargs=True))
    return handle


def _convert(memory_format: torch.memory_format, block: nn.Module, args: Any, kwargs: Any) -> Any:
    def converted(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor

    return tree_map_only(Tensor, converted, (args, kwargs))
