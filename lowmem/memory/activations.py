"""Activation policies, block by block: keep, recompute, or keep in host memory.

A policy replaces the `forward` of a block's instance, so names of parameters and buffers never change. Recomputation is
PyTorch's non-reentrant checkpoint (Chen et al., 2016); batch-norm statistics and random masks are undisturbed, so gradients,
weights and buffers end bitwise equal.

`selective` keeps the outputs of convolutions, matrix products and attention calls, or some of them, and recomputes the rest.
Ordinals count those operations in the block's forward pass. An output that is changed in place afterwards cannot be kept.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lowmem.errors import LowmemError
from lowmem.memory import offload
from lowmem.memory.again import is_whole
from lowmem.memory.batchnorm import batchnorms, recomputing
from lowmem.memory.dropout import draws_random_numbers, mask_mode
from lowmem.memory.offload import Group, HostStore, Ticket
from lowmem.memory.saved import SavedTensors
from lowmem.phases import phase
from lowmem.planning.plan import KEEP_ALL, STEM, BlockPolicy

aten = torch.ops.aten
KEEPABLE_OPS = {
    aten.convolution.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose outputs `selective` can keep: the ones that are dear to run again."""


@dataclass
class PolicyHandle:
    """Undoes `apply_policies`."""

    blocks: list[nn.Module] = field(default_factory=list)
    store: HostStore | None = None
    stem: ExitStack = field(default_factory=ExitStack)
    """What ends when the first block begins."""

    def remove(self) -> None:
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self.blocks.clear()

    def reset(self) -> None:
        """After a step that failed half-way: forget what it had offloaded."""
        if self.store is not None:
            self.store.reset()

    def end_forward(self) -> None:
        if self.store is not None:
            self.store.end_forward()

    def end_backward(self) -> None:
        if self.store is not None:
            self.store.end_backward()


def apply_policies(model: nn.Module, policies: dict[str, BlockPolicy]) -> PolicyHandle:
    """Switch on each block's policy; raises LowmemError for a block that the model does not have."""
    handle = PolicyHandle()
    if any(policy.offloads for policy in policies.values()):
        handle.store = HostStore(next(model.parameters()).device)
    for path, policy in policies.items():
        try:
            block = model.get_submodule(path)
        except AttributeError:
            raise LowmemError(
                f"The plan names a block {path!r} that this model does not have: it was made for another model."
            ) from None
        if policy == KEEP_ALL and handle.store is None and STEM not in policies:
            continue
        run = _run_stem if path == STEM else _run_block
        block.forward = partial(run, handle, block, block.forward, policy)
        handle.blocks.append(block)
    return handle


def _run_stem(
    handle: PolicyHandle, model: nn.Module, forward: Callable[..., Any], policy: BlockPolicy, *args: Any, **kwargs: Any
) -> Any:
    """The whole network; what it saves before its first block is under the policy."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if handle.store is not None:
        handle.store.begin_block()
    if policy.again or policy.offloads:
        handle.stem.enter_context(SavedTensors(model, policy, handle.store).watching())
    try:
        return forward(*args, **kwargs)
    finally:
        handle.stem.close()


def _run_block(
    handle: PolicyHandle, block: nn.Module, forward: Callable[..., Any], policy: BlockPolicy, *args: Any, **kwargs: Any
) -> Any:
    handle.stem.close()
    return _RUN[policy.recompute](block, forward, policy, handle.store, *args, **kwargs)


def _run_none(
    block: nn.Module,
    forward: Callable[..., Any],
    policy: BlockPolicy,
    store: HostStore | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled() or not (store is not None or policy.again):
        return forward(*args, **kwargs)
    group = store.begin_block() if store is not None else None
    if not policy.offloads and not policy.again:
        return _announced(forward(*args, **kwargs), store, group)
    with SavedTensors(block, policy, store).watching():
        output = forward(*args, **kwargs)
    return output if policy.offloads and not policy.again else _announced(output, store, group)


def _run_full(
    block: nn.Module,
    forward: Callable[..., Any],
    policy: BlockPolicy,
    store: HostStore | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    group = store.begin_block() if store is not None else None
    output = _checkpoint(block, forward, lambda: (nullcontext(), recomputing(batchnorms(block))), args, kwargs)
    return _announced(output, store, group)


def _run_selective(
    block: nn.Module,
    forward: Callable[..., Any],
    policy: BlockPolicy,
    store: HostStore | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    group = store.begin_block() if store is not None else None
    output = _checkpoint(block, forward, lambda: _selective_contexts(block, policy, store), args, kwargs)
    return output if policy.offloads else _announced(output, store, group)


def _announced(output: Any, store: HostStore | None, group: Group | None) -> Any:
    """The output of a block that offloads nothing; when its backward pass starts, the block before it is fetched."""
    tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad), None)
    if store is not None and group is not None and tensor is not None:
        tensor.register_hook(partial(_fetch_ahead, store, group))
    return output


def _fetch_ahead(store: HostStore, group: Group, grad: Tensor) -> None:
    store.fetch_ahead(group)


_RUN = {"none": _run_none, "full": _run_full, "selective": _run_selective}


def _checkpoint(
    block: nn.Module, forward: Callable[..., Any], contexts: Callable[[], Any], args: Any, kwargs: Any
) -> Any:
    context_fn = partial(_both_runs, mask_mode() or nullcontext(), contexts)
    # Taken apart and put together again, so that a list which the caller goes on filling (DenseNet) is recomputed as it was.
    leaves, structure = tree_flatten((args, kwargs))

    def run(*leaves: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return forward(*args, **kwargs)

    return checkpoint(
        run, *leaves, use_reentrant=False, context_fn=context_fn, preserve_rng_state=draws_random_numbers(block)
    )


def _both_runs(
    masks: AbstractContextManager[Any], contexts: Callable[[], Any]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    first_run, second_run = contexts()
    return first_run, _second_run(masks, second_run)


@contextmanager
def _second_run(masks: AbstractContextManager[Any], context: AbstractContextManager[Any]) -> Iterator[None]:
    with phase("recomputation"), masks, context:
        yield


def _selective_contexts(
    block: nn.Module, policy: BlockPolicy, store: HostStore | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    kept: dict[int, Any] = {}
    host = set(policy.keep) if policy.host == "all" else set(policy.host) if policy.offloads else set()
    return _Keep(set(policy.keep), host, kept, store), _replaying(block, kept, store)


@contextmanager
def _replaying(block: nn.Module, kept: dict[int, Any], store: HostStore | None) -> Iterator[None]:
    with recomputing(batchnorms(block)), _Replay(kept, store):
        yield


class _Keep(TorchDispatchMode):
    """Forward pass: put the wanted outputs aside."""

    def __init__(self, keep: set[int], host: set[int], kept: dict[int, Any], store: HostStore | None) -> None:
        super().__init__()
        self.keep, self.host, self.kept, self.store = keep, host, kept, store
        self.ordinal = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, at 10 microseconds an operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KEEPABLE_OPS:
            if self.ordinal in self.keep and not _draws_mask(func, args, kwargs):
                self.kept[self.ordinal] = tree_map_only(
                    Tensor, partial(self._put_aside, self.ordinal in self.host), result
                )
            self.ordinal += 1
        return result

    def _put_aside(self, to_host: bool, tensor: Tensor) -> Any:
        # A tensor that is returned from here gets autograd's history attached; what is kept must not carry the graph.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            plain = tensor.detach()
        if to_host and self.store is not None and tensor.nbytes >= offload.MIN_OFFLOAD_BYTES and is_whole(plain):
            return _Kept(self.store.put(plain), plain._version)
        return _Kept(plain, plain._version)


class _Replay(TorchDispatchMode):
    """Recomputation: hand the kept outputs back instead of computing them."""

    def __init__(self, kept: dict[int, Any], store: HostStore | None) -> None:
        super().__init__()
        self.kept, self.store = kept, store
        self.ordinal = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, at 10 microseconds an operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEEPABLE_OPS:
            return func(*args, **(kwargs or {}))
        ordinal, self.ordinal = self.ordinal, self.ordinal + 1
        if ordinal not in self.kept:
            return func(*args, **(kwargs or {}))
        return tree_map_only(_Kept, partial(self._hand_back, ordinal), self.kept.pop(ordinal))

    def _hand_back(self, ordinal: int, kept: "_Kept") -> Tensor:
        if isinstance(kept.value, Ticket):
            assert self.store is not None
            return self.store.get(kept.value)
        if kept.value._version != kept.version:
            raise LowmemError(
                f"Output {ordinal} of a block was changed in place after it was kept; the plan must recompute it."
            )
        return kept.value


@dataclass
class _Kept:
    value: Tensor | Ticket
    version: int


def _draws_mask(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention with dropout in its kernel: it must run again, so that the masks after it are drawn as before."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | (kwargs or {})
    return bool(named.get("dropout_p", 0.0))
