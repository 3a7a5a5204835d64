"""Floating-point operations and bytes moved by one operation, from its arguments and results."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default}
CONVOLUTION_GRADIENTS = {aten.convolution_backward.default}
PRODUCTS = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0, aten.baddbmm.default: 1}
"""Matrix products and the position of their first factor."""
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}


NOTHING_MOVED = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.lift_fresh.default, aten._unsafe_view.default}  # fmt: skip


@dataclass(frozen=True)
class OpCost:
    """`dtype` is that of the arithmetic: bf16, fp16 or fp32; `groups` of a convolution, 1 elsewhere."""

    name: str
    flops: int
    num_bytes: int
    dtype: str
    groups: int = 1


def op_cost(func: Any, args: Any, kwargs: Any, result: Any) -> OpCost | None:
    """The cost of one dispatched operation; None for views and bare allocations, which move nothing."""
    if func.is_view or func in NOTHING_MOVED or func.namespace == "prim":
        return None
    tensors = [*_tensors(args), *_tensors((kwargs or {}).values()), *_tensors((result,))]
    if not tensors:
        return None
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    flops, groups = _flops(func, args, result)
    return OpCost(str(func), flops, num_bytes, _dtype_name(tensors), groups)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _flops(func: Any, args: Any, result: Any) -> tuple[int, int]:
    """(operations, groups); a multiply-add counts as two, and only products are counted."""
    if func in CONVOLUTIONS:
        weight, groups = args[1], args[8]
        return 2 * result.numel() * math.prod(weight.shape[1:]), groups
    if func in CONVOLUTION_GRADIENTS:
        grad, weight, groups, wanted = args[0], args[2], args[9], args[10]
        return 2 * grad.numel() * math.prod(weight.shape[1:]) * (int(wanted[0]) + int(wanted[1])), groups
    if func in PRODUCTS:
        first = args[PRODUCTS[func]]
        return 2 * result.numel() * first.shape[-1], 1
    if func in ATTENTION:
        query, key = args[0], args[1]
        return 4 * query.numel() * key.shape[-2], 1
    if "scaled_dot_product" in str(func) and "backward" in str(func):
        query, key = args[1], args[2]
        return 10 * query.numel() * key.shape[-2], 1
    return 0, 1


def _dtype_name(tensors: list[Tensor]) -> str:
    kinds = {tensor.dtype for tensor in tensors}
    return "bf16" if torch.bfloat16 in kinds else "fp16" if torch.float16 in kinds else "fp32"
