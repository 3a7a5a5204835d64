"""What a block saves for its backward pass, storage by storage: held, sent to host memory, or made again."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowmem.memory import offload
from lowmem.memory.again import Absent, Call, Held, Recorder, Remade, Use, address_of, is_whole, layout_of
from lowmem.memory.offload import HostStore, Ticket
from lowmem.planning.plan import BlockPolicy

Packed = Tensor | Ticket | Use | Held


class SavedTensors:
    """Hooks for one forward pass of a block. Storages have ordinals, in the order in which they are first saved."""

    def __init__(self, block: nn.Module, policy: BlockPolicy, store: HostStore | None) -> None:
        self.store = store
        self.to_host = None if policy.host == "all" else set(policy.host) if policy.offloads else set()
        self.again = set(policy.again)
        self.recorder = Recorder(self._absent) if policy.again else None
        self.own = {address_of(tensor) for tensor in (*block.parameters(), *block.buffers())}
        self.ordinals: dict[int, int] = {}
        """By the identity of the storage."""
        self.sizes: dict[int, int] = {}
        self.in_parts: set[int] = set()
        """Storages of which a view is saved, too: they stay on the device."""
        self.remade: dict[int, Remade] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context: the block's forward pass."""
        with ExitStack() as stack:
            if self.recorder is not None:
                stack.enter_context(self.recorder)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack))
            try:
                yield
            finally:
                self.end()

    def end(self) -> None:
        """The forward pass is over: nothing more is noted, and nothing that was noted is held."""
        if self.recorder is not None:
            self.recorder.calls.clear()

    def pack(self, tensor: Tensor) -> Packed:
        if self._is_small(tensor) or isinstance(tensor, nn.Parameter):
            return tensor
        identity = self.identity(tensor)
        if not is_whole(tensor):
            self.in_parts.add(identity)
            return tensor
        ordinal = self.ordinals.setdefault(identity, len(self.ordinals))
        self.sizes[identity] = tensor.nbytes
        packed: Packed | None = self._as_remade(identity, tensor) if ordinal in self.again else None
        if self.recorder is not None:
            self.recorder.forget(tensor)
        if packed is None:
            packed = self._put(tensor) if self._goes_to_host(ordinal) else tensor
        return packed

    def unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, Ticket):
            assert self.store is not None
            return self.store.get(packed)
        return packed if isinstance(packed, Tensor) else packed.get()

    def identity(self, tensor: Tensor) -> int:
        """Of the storage, among those of this pass."""
        return address_of(tensor) if self.recorder is None else self.recorder.identity(tensor)

    def _is_small(self, tensor: Tensor) -> bool:
        return address_of(tensor) in self.own or tensor.nbytes < offload.MIN_OFFLOAD_BYTES

    def _goes_to_host(self, ordinal: int) -> bool:
        return self.store is not None and (self.to_host is None or ordinal in self.to_host)

    def _put(self, tensor: Tensor) -> Ticket:
        assert self.store is not None
        return self.store.put(tensor.detach())

    def _as_remade(self, identity: int, tensor: Tensor) -> Use | None:
        """None where it is not known how the tensor was made, or where one of the arguments is nowhere to be had."""
        assert self.recorder is not None
        if identity not in self.remade:
            calls = self.recorder.calls.get(address_of(tensor))
            if calls is None or not self._can_make(calls):
                return None
            self.remade[identity] = self._remade(calls, self.recorder.layouts[address_of(tensor)][2])
        absent = self.remade[identity].seen_as(tensor)
        return None if absent is None else absent.use()

    def _absent(self, tensor: Tensor) -> Absent | None:
        remade = self.remade.get(self.identity(tensor))
        return None if remade is None else remade.seen_as(tensor)

    def _remade(self, calls: tuple[Call, ...], dtype: torch.dtype) -> Remade:
        packed = tuple(
            replace(call, args=args, kwargs=kwargs)
            for call in calls
            for args, kwargs in [tree_map(self._argument, (call.args, call.kwargs))]
        )
        return Remade(packed, dtype, self._value_of)

    def _value_of(self, leaf: Any) -> Any:
        return self.unpack(leaf) if isinstance(leaf, Ticket | Use | Held) else leaf

    def _can_make(self, calls: tuple[Call, ...]) -> bool:
        return all(self._can_have(held.tensor, held.version) for call in calls for held in call.held())

    def _can_have(self, tensor: Tensor, version: int) -> bool:
        if self._is_small(tensor):
            return True
        if tensor._version != version or not is_whole(tensor):
            return False
        if self.identity(tensor) in self.ordinals:
            return True
        assert self.recorder is not None
        calls = self.recorder.calls.get(address_of(tensor))
        as_made = self.recorder.layouts.get(address_of(tensor)) == layout_of(tensor)
        return calls is not None and as_made and self._can_make(calls)

    def _argument(self, leaf: Any) -> Any:
        """As it is saved; one that nobody saves is made again for this purpose alone."""
        if isinstance(leaf, Absent):
            return leaf.use()
        if not isinstance(leaf, Held) or self._is_small(leaf.tensor):
            return leaf if not isinstance(leaf, Held) else _without_history(leaf)
        tensor, identity = leaf.tensor, self.identity(leaf.tensor)
        absent = self._absent(tensor)
        if absent is None and identity not in self.ordinals:
            assert self.recorder is not None
            absent = self._remade(self.recorder.calls[address_of(tensor)], tensor.dtype).seen_as(tensor)
        if absent is not None:
            return absent.use()
        return self._put(tensor) if self._goes_to_host(self.ordinals[identity]) else _without_history(leaf)


def _without_history(held: Held) -> Held:
    return Held(held.tensor.detach(), held.version)
