"""Saved tensors that are made again in the backward pass, one by one, from what else is saved.

While a block runs, a `Recorder` notes how each tensor comes about. One that shall be made again is not held: a `Remade` holds the
operations instead, with their arguments as these are saved (held, in host memory, or made again themselves), and runs them when
autograd asks for the tensor. What comes after the last tensor that is needed is not run a second time. Only operations whose result
depends on nothing but their arguments are recorded; batch norms run their second time with momentum 0, so statistics stay as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lowmem.errors import LowmemError
from lowmem.phases import phase

aten = torch.ops.aten
PURE = {
    aten.convolution.default,
    aten.native_batch_norm.default,
    aten.cudnn_batch_norm.default,
    aten.miopen_batch_norm.default,
    aten._native_batch_norm_legit.default,
    aten.relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.sigmoid.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.hardtanh.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.clone.default,
    aten._to_copy.default,
    aten.avg_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.reflection_pad2d.default,
    aten.constant_pad_nd.default,
    aten.cat.default,
}
"""Operations that give the same bits for the same arguments, in tensors of their own."""
IN_PLACE = {
    aten.relu_.default,
    aten.silu_.default,
    aten.hardswish_.default,
    aten.hardsigmoid_.default,
    aten.leaky_relu_.default,
    aten.hardtanh_.default,
    aten.sigmoid_.default,
    aten.add_.Tensor,
    aten.mul_.Tensor,
}
"""The same, in the place of their first argument."""


class _Itself:
    """Stands for the tensor that is being made, as an argument."""


_ITSELF = _Itself()


@dataclass(frozen=True)
class Held:
    """An argument that stays where it is."""

    tensor: Tensor
    version: int

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise LowmemError(
                "A tensor was changed in place after another was made of it; the plan must not make that again."
            )
        return self.tensor


@dataclass(frozen=True)
class Absent:
    """An argument that is made again itself."""

    remade: "Remade"
    shape: torch.Size
    stride: tuple[int, ...]

    def use(self) -> "Use":
        self.remade.num_uses += 1
        return Use(self.remade, self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """One operation. `output`: which of several results is meant."""

    func: Any
    args: Any
    kwargs: Any
    output: int | None = None

    def held(self) -> list[Held]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Held)]


class Recorder(TorchDispatchMode):
    """Context: notes how tensors are made. `calls` are by the address of the storage; `identity` tells storages apart that had the
    same address one after the other."""

    def __init__(self, absent: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.absent = absent
        """What stands for an argument that is not held, or None."""
        self.calls: dict[int, tuple[Call, ...]] = {}
        self.layouts: dict[int, Any] = {}
        """Of the tensors of `calls`, as they were made."""
        self.numbers: dict[int, int] = {}
        self.next_number = count(-1, -1)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, at 10 microseconds an operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in IN_PLACE:
            self._changed(func, args, kwargs)
        elif not func.is_view:
            self._made(func, args, kwargs, result)
        return result

    def identity(self, tensor: Tensor) -> int:
        address = address_of(tensor)
        return self.numbers.get(address, address)

    def forget(self, tensor: Tensor) -> None:
        """How a tensor was made is asked once, when it is saved first; until then its arguments are held."""
        self.calls.pop(address_of(tensor), None)

    def _made(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        given = set(map(address_of, _tensors((*args, *kwargs.values()))))
        for changed in () if func in PURE else _written(func, args, kwargs):
            self.forget(changed)
        results = result if isinstance(result, tuple | list) else (result,)
        for position, leaf in enumerate(results):
            if not isinstance(leaf, Tensor) or address_of(leaf) in given:
                continue
            self.numbers[address_of(leaf)] = next(self.next_number)
            self.forget(leaf)
            if func in PURE and is_whole(leaf):
                output = None if leaf is result else position
                self.calls[address_of(leaf)] = (self._call(func, _repeatable(func, args), kwargs, output),)
                self.layouts[address_of(leaf)] = layout_of(leaf)

    def _changed(self, func: Any, args: Any, kwargs: Any) -> None:
        before = self.calls.pop(address_of(args[0]), None)
        others = map(address_of, _tensors((*args[1:], *kwargs.values())))
        as_made = layout_of(args[0]) == self.layouts.get(address_of(args[0]))
        if before is not None and as_made and address_of(args[0]) not in others:
            self.calls[address_of(args[0])] = (*before, self._call(func, (_ITSELF, *args[1:]), kwargs, None))

    def _call(self, func: Any, args: Any, kwargs: Any, output: int | None) -> Call:
        kwargs = {name: self._argument(value) for name, value in kwargs.items()}
        return Call(func, tuple(map(self._argument, args)), kwargs, output)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.absent(value) or Held(value, value._version)
        return [self._argument(item) for item in value] if isinstance(value, list | tuple) else value


class Remade:
    """A storage that is not there: how to make it again. It is held from the first time that it is asked for to the last."""

    def __init__(self, calls: tuple[Call, ...], dtype: torch.dtype, value_of: Callable[[Any], Any]) -> None:
        self.calls, self.dtype, self.value_of = calls, dtype, value_of
        self.num_uses = 0
        self.tensor: Tensor | None = None

    def seen_as(self, tensor: Tensor) -> Absent | None:
        """Stands for `tensor`; None where that is not all of the storage in some order of axes."""
        fits = tensor.dtype == self.dtype and is_whole(tensor)
        return Absent(self, tensor.shape, tensor.stride()) if fits else None

    def get(self) -> Tensor:
        if self.tensor is None:
            with torch.no_grad(), phase("recomputation"):
                self.tensor = self._made()
            self.calls = ()
        tensor = self.tensor
        self.num_uses -= 1
        if self.num_uses == 0:
            self.tensor = None
        return tensor

    def _made(self) -> Tensor:
        made: Any = None
        for call in self.calls:
            args, kwargs = tree_map(partial(self._given, made), (call.args, call.kwargs))
            result = call.func(*args, **kwargs)
            made = result if call.output is None else result[call.output]
        return made

    def _given(self, made: Any, leaf: Any) -> Any:
        return made if leaf is _ITSELF else self.value_of(leaf)


@dataclass(frozen=True)
class Use:
    """One place where a storage that is made again is needed."""

    remade: Remade
    shape: torch.Size
    stride: tuple[int, ...]

    def get(self) -> Tensor:
        made = self.remade.get()
        return (
            made
            if (made.shape, made.stride()) == (self.shape, self.stride)
            else made.as_strided(self.shape, self.stride)
        )


def address_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage, in whatever order of axes and without overlap."""
    overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride()))
    is_lazy = tensor.is_conj() or tensor.is_neg()
    is_all = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.storage_offset() == 0
    return is_all and not overlaps and not is_lazy


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _repeatable(func: Any, args: Any) -> Any:
    """A batch norm's arguments with momentum 0."""
    position = _momentum_position(func)
    return args if position is None else (*args[:position], 0.0, *args[position + 1 :])


@cache
def _momentum_position(func: Any) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return names.index("momentum") if "momentum" in names else None


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation changes."""
    given = dict(enumerate(args)) | kwargs
    return [given[key] for key in _written_keys(func) if isinstance(given.get(key), Tensor)]


@cache
def _written_keys(func: Any) -> tuple[int | str, ...]:
    """By position, or by name where an argument has no position."""
    return tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
