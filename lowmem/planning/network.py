"""A network of fake tensors: all its shapes, none of its memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.planning.blocks import find_blocks
from lowmem.planning.plan import STEM
from lowmem.planning.shapes import ShapeMode
from lowmem.planning.stem import Stem
from lowmem.recipe import Recipe
from lowmem.training.model import build_model, freeze_batchnorm


class FakeNetwork:
    """The recipe's model on the fake CPU, in training mode, in channels_last or contiguous layout.

    `mode` is what makes tensors fake. A model is built on the meta device, which costs nothing; some have initialisations that look at their values, and are
    built for real first.
    """

    def __init__(
        self,
        recipe: Recipe,
        num_classes: int,
        memory_format: str = "channels_last",
        real_build: bool = False,
        mode: AbstractContextManager[Any] | None = None,
    ) -> None:
        self.recipe, self.num_classes, self.memory_format = recipe, num_classes, memory_format
        self.mode = mode or ShapeMode()
        self.model = self._converted(self._built(real_build))
        self.training_mode()
        self.blocks = find_blocks(self.model)
        self.first_block = ""

    def unit(self, path: str) -> nn.Module:
        """A block, or the stem, whose end is known once a step was traced."""
        return Stem(self.model, self.blocks[self.first_block]) if path == STEM else self.blocks[path]

    def training_mode(self) -> None:
        self.model.train()
        if self.recipe.model.freeze_batchnorm:
            freeze_batchnorm(self.model)

    @contextmanager
    def fake(self) -> Iterator[None]:
        """Context: tensors made inside are fake, and the process's random state stays as it is."""
        with torch.random.fork_rng(devices=[]), self.mode:
            yield

    def parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _built(self, real_build: bool) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            if real_build:
                return build_model(self.recipe.model, self.num_classes)
            try:
                with torch.device("meta"):
                    return build_model(self.recipe.model, self.num_classes)
            except (RuntimeError, NotImplementedError):
                return build_model(self.recipe.model, self.num_classes)

    def _converted(self, model: nn.Module) -> nn.Module:
        """Parameters and buffers replaced by fake ones of the same shape, layout and dtype."""
        channels_last = self.memory_format == "channels_last"
        memo: dict[int, Tensor] = {}
        with self.mode:
            for module in model.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            table[name] = memo.setdefault(id(tensor), _fake_like(tensor, channels_last))
        return model


def _fake_like(tensor: Tensor, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last and tensor.dim() == 4 else torch.contiguous_format
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", memory_format=layout)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
