"""Operations that compute shapes only: a whole training step in a fraction of a second, in no memory.

Under `ShapeMode` no kernel runs. An operation's results get the shapes, strides and dtypes that PyTorch finds for it on meta tensors, or
under its FakeTensorMode where that fails; each (operation, shapes) is asked once, which is what makes this fast: a network
repeats its operations, and FakeTensorMode takes 0.1 to 0.3 ms for each. Results are plain CPU tensors, so autograd, autocast and checkpointing treat them as such. Their storages have
the right sizes but are all windows onto the same pages, which nothing writes to and which therefore take up no memory.
"""

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
VIEWS_UNDECLARED = {aten._unsafe_view.default, aten.lift_fresh.default}
"""Operations that give back their argument's storage though their schema does not say so."""
Maker = Callable[[list[Tensor]], Any]
"""Makes one result from the tensors among an operation's arguments."""


@dataclass(frozen=True)
class _Sizes:
    """A fresh result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    num_elements: int
    """Of the storage."""


_KNOWN: dict[Any, tuple[bool, tuple[Maker, ...]]] = {}
"""Makers of an operation's results by the operation and its arguments' shapes: whether there is one result, and how each is made."""


class ShapeMode(TorchDispatchMode):
    """Context: operations on CPU tensors give results of the right shape, stride, dtype and storage size, and compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, which costs more than the function itself."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in VIEWS_UNDECLARED or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)  # the real one, which touches no element
        tensors: list[Tensor] = []
        key = (func, *_described(args, tensors), *(kwargs and _described(kwargs.items(), tensors)))
        found = _KNOWN.get(key)
        if found is None:
            if _is_meta(tensors, kwargs):
                return func(*args, **kwargs)
            found = _KNOWN[key] = self._asked(func, args, kwargs, tensors)
        is_one, makers = found
        return makers[0](tensors) if is_one else tuple(make(tensors) for make in makers)

    def _asked(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> tuple[bool, tuple[Maker, ...]]:
        """What the operation gives for tensors of these shapes, as makers of its results."""
        try:
            blanks = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
            result = _on_meta(func, *_with(blanks, args, kwargs), *_with(tensors, args, kwargs))
        except (RuntimeError, NotImplementedError, TypeError):
            with self.fake:
                blanks = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in tensors]
                blank_args, blank_kwargs = _with(blanks, args, kwargs)
                result = func(*blank_args, **blank_kwargs)
        owners = {blank.untyped_storage()._cdata: number for number, blank in enumerate(blanks)}
        if isinstance(result, tuple | list):
            return False, tuple(self._maker(leaf, blanks, owners) for leaf in result)
        return True, (self._maker(result, blanks, owners),)

    def _maker(self, leaf: Any, blanks: list[Tensor], owners: dict[int, int]) -> Maker:
        if not isinstance(leaf, Tensor):
            return lambda tensors: leaf
        number = owners.get(leaf.untyped_storage()._cdata)
        if number is None:
            sizes = _Sizes(
                tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.untyped_storage().nbytes() // leaf.itemsize
            )
            return lambda tensors: _WINDOW.tensor(sizes)
        if leaf is blanks[number]:
            return lambda tensors: tensors[number]
        view = leaf.shape, leaf.stride(), leaf.storage_offset()
        return lambda tensors: tensors[number].as_strided(*view)


def _with(tensors: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with their tensors replaced, in order."""
    following = iter(tensors)
    return tree_map_only(Tensor, lambda _: next(following), (args, kwargs))


def _on_meta(func: Any, args: Any, kwargs: dict[str, Any], real_args: Any, real_kwargs: dict[str, Any]) -> Any:
    """The operation on meta tensors; convolutions get the layout that the CPU's kernels give their results."""
    if func in _RULES:
        return _RULES[func](*args, **kwargs)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("meta")}
    result = func(*args, **kwargs)
    if func is aten.convolution.default:
        return result.to(memory_format=_convolution_layout(*real_args, **real_kwargs))
    if func is aten.convolution_backward.default:
        layout = _convolution_layout(real_args[1], real_args[2], None, *real_args[4:10], bias_sizes=real_args[3])
        return tuple(t if t is None or t.dim() == 1 else t.to(memory_format=layout) for t in result)
    return result


def _convolution_layout(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, bias_sizes: Any = None,
) -> torch.memory_format:  # fmt: skip
    if weight.dim() != 4:
        raise NotImplementedError
    backend = torch._C._select_conv_backend(
        x, weight, bias=bias, stride=stride, padding=padding, dilation=dilation, transposed=transposed,
        output_padding=output_padding, groups=groups, **({"bias_sizes": bias_sizes} if bias is None else {}),
    )  # fmt: skip
    return torch._C._conv_determine_backend_memory_format(x, weight, backend)


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Any:
    """PyTorch's own rule is a Python decomposition that takes milliseconds."""
    stats = (weight if weight is not None else x).new_empty(x.shape[1] if training else 0)
    return torch.empty_like(x), stats, torch.empty_like(stats)


def _batch_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    wanted = rest[-1]
    parameter = (weight if weight is not None else x).new_empty(x.shape[1])
    made = torch.empty_like(x), parameter, torch.empty_like(parameter)
    return tuple(tensor if is_wanted else None for tensor, is_wanted in zip(made, wanted))


_RULES = {
    aten.native_batch_norm.default: _batch_norm,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
}


class _Window:
    """Storages of any size that all begin at the same untouched pages."""

    def __init__(self) -> None:
        self.pages = mmap.mmap(-1, 1 << 20)

    def tensor(self, sizes: _Sizes) -> Tensor:
        if not sizes.num_elements:
            return torch.empty_strided(sizes.shape, sizes.stride, dtype=sizes.dtype)
        num_bytes = sizes.num_elements * sizes.dtype.itemsize
        if num_bytes > len(self.pages):
            self.pages = mmap.mmap(-1, 2 * num_bytes)  # the old pages live on in the tensors that have them
        flat = torch.frombuffer(self.pages, dtype=sizes.dtype, count=sizes.num_elements)
        return flat.as_strided(sizes.shape, sizes.stride)


_WINDOW = _Window()


def _described(values: Any, tensors: list[Tensor]) -> Iterator[Any]:
    """Arguments as parts of a key; the tensors among them are added to `tensors`. True, 1 and 1.0 stay apart."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
            yield value.shape
            yield value.stride()
            yield value.dtype
        elif isinstance(value, list | tuple):
            yield tuple(_described(value, tensors))
        else:
            yield value.__class__
            yield value


def _is_meta(tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return any(t.is_meta for t in tensors) or (device is not None and torch.device(device).type == "meta")


