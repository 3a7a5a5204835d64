"""What a worker makes: the pixels of one image, a function of (epoch, index) alone. Nothing here imports torch, so that a worker process
stays small."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from lowmem.data.augment import AugmentLike, Draws, augmented, evaluated
from lowmem.data.split import Split

Pixels = Callable[[int, int], np.ndarray]
"""(epoch, index) -> uint8 [px, px, 3]."""


@dataclass(frozen=True)
class TrainPixels:
    """Augmented images of a split."""

    split: Split
    recipe: AugmentLike
    px: int
    seed: int

    def __call__(self, epoch: int, index: int) -> np.ndarray:
        return augmented(self.split.source(index), self.recipe, self.px, Draws(self.seed, epoch, index))

    def __reduce__(self) -> tuple[object, ...]:
        """A worker gets the recipe's fields without the library that checks them."""
        fields = {name: getattr(self.recipe, name) for name in AugmentLike.__annotations__}
        return TrainPixels, (self.split, SimpleNamespace(**fields), self.px, self.seed)


@dataclass(frozen=True)
class EvalPixels:
    """Images of a split, resized and cropped in the centre."""

    split: Split
    px: int
    crop_frac: float

    def __call__(self, epoch: int, index: int) -> np.ndarray:
        return evaluated(self.split.source(index), self.px, self.crop_frac)
