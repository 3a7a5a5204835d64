"""The moving average of weights and statistics that a recipe may ask for: timm's ModelEmaV3, with its state by name.

It is updated once after each optimizer step, whatever the step's micro-batches. The first update takes the weights as they are;
from then on each float tensor of the model's state becomes decay x average + (1 - decay) x tensor, batch-norm statistics too, and
counters are copied. It costs one copy of the model's state on the device and 12 bytes a weight of memory traffic a step. As in
timm, a step that a GradScaler skipped counts as an update.
"""

from collections.abc import Iterable, Iterator

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lowmem.recipe import EmaRecipe

PREFIX = "ema/"
COUNT = "ema.updates"
"""Name of the counter among the state, which no tensor of a model has: theirs begin with PREFIX."""


class Ema:
    """The average of a model that is on its device, and how many updates it has had."""

    def __init__(self, model: nn.Module, recipe: EmaRecipe) -> None:
        assert recipe.decay is not None
        self.average = ModelEmaV3(model, decay=recipe.decay, use_warmup=recipe.warmup).requires_grad_(False)
        self.num_updates = 0

    @property
    def model(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        return self.average.module

    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        self.average.update(model, step=self.num_updates)

    def device_tensors(self) -> Iterable[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()

    def iter_state(self) -> Iterator[tuple[str, Tensor]]:
        """The state by name, `ema/TENSOR` and the counter."""
        yield COUNT, torch.tensor(self.num_updates)
        yield from ((PREFIX + name, tensor) for name, tensor in self.model.state_dict().items())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.num_updates = int(tensors[COUNT])
        self.model.load_state_dict(
            {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        )


def is_ema(name: str) -> bool:
    """Whether a tensor of a checkpoint is the average's."""
    return name == COUNT or name.startswith(PREFIX)


def ema_bytes(model: nn.Module, recipe: EmaRecipe) -> int:
    """What the average takes up on the device."""
    return 0 if recipe.decay is None else sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
