"""Batches that need no photographs: for what is measured or compared step by step."""

import torch

from lowmem.data.batch import HostBatch
from lowmem.randomness import torch_seed
from lowmem.recipe import Recipe


def random_batches(recipe: Recipe, num_classes: int, steps: int) -> list[HostBatch]:
    """Noise images of unequal brightness and contrast, so that parts of a batch have other statistics than the whole."""
    size, px = recipe.batch.size, recipe.data.train_px
    batches = []
    for step in range(steps):
        random = torch.Generator().manual_seed(torch_seed(recipe.seed, "verify", step))
        mean_B = torch.randint(40, 216, (size, 1, 1, 1), generator=random)
        contrast_B = torch.randint(5, 120, (size, 1, 1, 1), generator=random)
        noise_BHWC = torch.randn((size, px, px, 3), generator=random)
        images_BHWC = (mean_B + contrast_B * noise_BHWC).clamp_(0, 255).to(torch.uint8)
        batches.append(
            HostBatch(images_BHWC, torch.randint(num_classes, (size,), generator=random), torch.arange(size))
        )
    return batches
