"""Dropout and stochastic depth that depend on (seed, epoch, step, atom) alone.

Each atom starts from its own seed, so neither grouping nor a resume changes a mask. Where a plan may split an atom (no
batch norm looks across its images), every mask is drawn for the whole atom and each micro-batch takes its rows.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from lowmem.errors import LowmemError
from lowmem.randomness import torch_seed

RANDOM_MODULES = (nn.modules.dropout._DropoutNd, DropPath)
RANDOM_RATES = ("drop_rate", "drop_path_rate", "drop_prob", "attn_drop", "dropout", "prob")
"""Attributes under which timm modules keep the rates of functional dropout."""

_DROPOUT = ("input", "p", "training")
WHOLE_ATOM_DRAWS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.scaled_dot_product_attention: ("query", "key", "value", "attn_mask", "dropout_p"),
    F.multi_head_attention_forward: (
        "query",
        "key",
        "value",
        "embed_dim",
        "num_heads",
        "in_proj_weight",
        "in_proj_bias",
        "bias_k",
        "bias_v",
        "add_zero_attn",
        "dropout_p",
        "out_proj_weight",
        "out_proj_bias",
        "training",
    ),
    F.dropout1d: _DROPOUT,
    F.dropout2d: _DROPOUT,
    F.dropout3d: _DROPOUT,
    F.alpha_dropout: _DROPOUT,
    F.feature_alpha_dropout: _DROPOUT,
    F.rrelu: ("input", "lower", "upper", "training"),
} | dict.fromkeys(
    (
        F.gumbel_softmax,
        torch.rand,
        torch.randn,
        torch.rand_like,
        torch.randn_like,
        torch.randperm,
        torch.bernoulli,
        Tensor.uniform_,
        Tensor.normal_,
    ),
    (),
)
"""Draws whose rows cannot be taken from a draw for the whole atom, with the names of their arguments."""


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a forward pass in training may draw: a dropout layer, stochastic depth, or a rate for a functional one."""
    for part in module.modules():
        if isinstance(part, RANDOM_MODULES) and (getattr(part, "p", 0) or getattr(part, "drop_prob", 0)):
            return True
        rates = (part.__dict__.get(name) for name in RANDOM_RATES)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


@contextmanager
def atom_masks(
    seed: int, epoch: int, step: int, atom: int, rows: slice | None = None, atom_size: int = 0
) -> Iterator[None]:
    """Context: random masks of one atom; `rows` of `atom_size` where the atom may be split, None where it never is."""
    torch.manual_seed(torch_seed(seed, "dropout", epoch, step, atom))
    mode: AbstractContextManager[Any] = nullcontext() if rows is None else _AtomRows(rows, atom_size)
    with mode:
        yield


def _draws(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    given = dict(zip(WHOLE_ATOM_DRAWS[func], args)) | kwargs
    return given.get("dropout_p", 1.0) > 0 and given.get("p", 1.0) > 0 and given.get("training", True)


def mask_mode() -> AbstractContextManager[Any] | None:
    """What takes the rows of each mask at this moment. Recomputation enters it again: torch switches such a mode off for the
    length of a backward pass."""
    return next((mode for mode in _get_current_function_mode_stack() if isinstance(mode, _AtomRows)), None)


class _AtomRows(TorchFunctionMode):
    """Draws each mask for the whole atom and takes the rows of the running micro-batch."""

    def __init__(self, rows: slice, atom_size: int) -> None:
        super().__init__()
        self.rows, self.atom_size = rows, atom_size

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is Tensor.bernoulli_ and len(args) > 1 and isinstance(args[1], float):
            return args[0].copy_(self._bernoulli(args[0], args[1]))
        if func in WHOLE_ATOM_DRAWS and self._is_split() and _draws(func, args, kwargs):
            raise LowmemError(
                f"This model draws random numbers with {func.__name__}, which cannot be split over micro-batches. "
                "Use batch.norm_batch to make smaller atoms."
            )
        return func(*args, **kwargs)

    def _is_split(self) -> bool:
        return self.rows.stop - self.rows.start != self.atom_size

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        mask = self._bernoulli(input, 1 - p).div_(1 - p) if p < 1 else torch.zeros_like(input)
        return input.mul_(mask) if inplace else input * mask

    def _bernoulli(self, like: Tensor, keep_prob: float) -> Tensor:
        num_rows = self.rows.stop - self.rows.start
        factor, rest = divmod(like.shape[0], num_rows)
        if rest:
            raise LowmemError(f"A random mask of shape {tuple(like.shape)} cannot be split into {num_rows} images.")
        whole = torch.empty((self.atom_size * factor, *like.shape[1:]), dtype=like.dtype, device=like.device)
        whole.bernoulli_(keep_prob)
        return whole[self.rows.start * factor : self.rows.stop * factor].clone()
