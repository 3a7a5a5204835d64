"""Mixup over the whole batch (Zhang et al., 2018), drawn from (seed, epoch, step) before the batch is split."""

from dataclasses import dataclass

import numpy as np

from lowmem.randomness import generator
from lowmem.recipe import MixupRecipe


@dataclass(frozen=True)
class MixupDraw:
    """Image i becomes lam * image i + (1 - lam) * image partner[i]; `partner_B` is int64 [B]."""

    lam: float
    partner_B: np.ndarray


def draw_mixup(recipe: MixupRecipe, seed: int, epoch: int, step: int, batch_size: int) -> MixupDraw | None:
    """The draw of one step; None where this batch is not mixed."""
    if recipe.prob == 0:
        return None
    random = generator(seed, "mixup", epoch, step)
    if random.random() >= recipe.prob:
        return None
    return MixupDraw(float(random.beta(recipe.alpha, recipe.alpha)), random.permutation(batch_size))
