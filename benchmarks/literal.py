"""The recipe's augmentation in its literal order, one torchvision operation after the other on a PIL image, with lowmem's own draws.

What lowmem's cheaper order is compared with: the same crop, strength and choice for each image, so that only the arithmetic differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision.transforms.functional as TF
from PIL import Image

from lowmem.data.augment import AugmentLike, Draws, crop_box
from lowmem.data.split import Split

BLUR_KERNEL_PX = 17
"""Wide enough for four standard deviations of the recipe's widest blur."""
BILINEAR = TF.InterpolationMode.BILINEAR


@dataclass(frozen=True)
class LiteralPixels:
    """As lowmem.data.pixels.TrainPixels, literally."""

    split: Split
    recipe: AugmentLike
    px: int
    seed: int

    def __call__(self, epoch: int, index: int) -> np.ndarray:
        return literally_augmented(self.split.path(index), self.recipe, self.px, Draws(self.seed, epoch, index))


def literally_augmented(path: Path, recipe: AugmentLike, px: int, draws: Draws) -> np.ndarray:
    """uint8 [px, px, 3]."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    *_, (_, picture) = literal_steps(picture, recipe, px, draws)
    return np.asarray(picture)


def literal_steps(
    picture: Image.Image, recipe: AugmentLike, px: int, draws: Draws
) -> Iterator[tuple[str, Image.Image]]:
    """(operation, the picture after it), in the recipe's order."""
    left, top, right, bottom = crop_box(*picture.size, recipe, draws)
    if draws.blur < recipe.blur_prob:
        sigma = recipe.blur_sigma[0] + draws.sigma * (recipe.blur_sigma[1] - recipe.blur_sigma[0])
        picture = TF.gaussian_blur(picture, BLUR_KERNEL_PX, sigma)
        yield "blur", picture
    picture = TF.resized_crop(picture, top, left, bottom - top, right - left, [px, px], BILINEAR, antialias=True)
    yield "crop", picture
    if draws.sharpen < recipe.sharpen_prob:
        picture = TF.adjust_sharpness(picture, recipe.sharpen_factor)
        yield "sharpen", picture
    for name, strength, adjust in (
        ("brightness", recipe.brightness, TF.adjust_brightness),
        ("contrast", recipe.contrast, TF.adjust_contrast),
        ("saturation", recipe.saturation, TF.adjust_saturation),
    ):
        if strength:
            picture = adjust(picture, 1 + (2 * getattr(draws, name) - 1) * strength)
            yield name, picture
    if recipe.hue:
        picture = TF.adjust_hue(picture, (2 * draws.hue - 1) * recipe.hue)
        yield "hue", picture
    if draws.grey < recipe.grey_prob:
        picture = TF.rgb_to_grayscale(picture, 3)
        yield "grey", picture
    if draws.flip < recipe.flip_prob:
        picture = TF.hflip(picture)
    yield "flip", picture
