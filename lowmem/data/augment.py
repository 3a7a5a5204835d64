"""The recipe's augmentation: pixels that depend on (seed, epoch, image) alone.

The recipe's order is blur, random resized crop, sharpen, brightness, contrast, saturation, hue, grey, flip. The same pictures
come cheaper in another order and in fewer passes: the crop is folded into one resize, the blur follows it with its sigma scaled,
sharpening is one kernel, brightness and contrast are one table of levels, saturation and grey one matrix; hue is true to HSV
(colour.py).
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from lowmem.data.colour import hue_shifted
from lowmem.data.decode import Box, Shrunk, opened, resized_crop
from lowmem.randomness import generator

CROP_TRIES = 10
NUM_UNIFORMS = 2 * CROP_TRIES + 12
SMALLEST_VARIANCE = 0.004
"""A blur of less moves less than half a level between neighbours that differ by 255."""
BOX_VARIANCE, MAX_BOXES = 0.55, 2
"""Square pixels that one pass of a box covers while its three weights look like a Gaussian's; more passes are no longer cheap."""
SMOOTH = (1, 1, 1, 1, 5, 1, 1, 1, 1)
"""Pillow's SMOOTH filter."""
GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma, as Pillow's "L"."""
LEVELS = np.arange(256)


class AugmentLike(Protocol):
    """The fields of lowmem.recipe.AugmentRecipe."""

    blur_prob: float
    blur_sigma: tuple[float, float]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    sharpen_prob: float
    sharpen_factor: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey_prob: float
    flip_prob: float


class Draws:
    """The random numbers of one image in one epoch, each with its fixed place, whichever operations are on."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        uniforms = generator(seed, "augment", epoch, index).random(NUM_UNIFORMS)
        self.crop = uniforms[: 2 * CROP_TRIES]
        (
            self.crop_x,
            self.crop_y,
            self.blur,
            self.sigma,
            self.sharpen,
            self.brightness,
            self.contrast,
            self.saturation,
            self.hue,
            self.grey,
            self.flip,
            _,
        ) = (float(value) for value in uniforms[2 * CROP_TRIES :])


def augmented(source: Path | Shrunk, recipe: AugmentLike, px: int, draws: Draws) -> np.ndarray:
    """One training image, uint8 [px, px, 3]."""
    with opened(source) as (image, full_size):
        box = crop_box(*full_size, recipe, draws)
        picture = resized_crop(image, box, px, px, full_size)
    picture = _blurred(picture, recipe, draws, box, px)
    if draws.sharpen < recipe.sharpen_prob:
        picture = sharpened(picture, recipe.sharpen_factor)
    picture = _coloured(picture, recipe, draws)
    if draws.flip < recipe.flip_prob:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def evaluated(source: Path | Shrunk, px: int, crop_frac: float) -> np.ndarray:
    """One image for evaluation, uint8 [px, px, 3]: short side resized to px / crop_frac, then the central px x px."""
    with opened(source) as (image, (width, height)):
        side = min(width, height) * crop_frac
        left, top = (width - side) / 2, (height - side) / 2
        return np.asarray(resized_crop(image, (left, top, left + side, top + side), px, px, (width, height)))


def crop_box(width: int, height: int, recipe: AugmentLike, draws: Draws) -> Box:
    """The random resized crop (Szegedy et al., 2015): area uniform, aspect ratio log-uniform, ten tries, then the centre."""
    low, high = math.log(recipe.crop_ratio[0]), math.log(recipe.crop_ratio[1])
    for attempt in range(CROP_TRIES):
        area_u, ratio_u = draws.crop[2 * attempt : 2 * attempt + 2]
        area = width * height * (recipe.crop_scale[0] + area_u * (recipe.crop_scale[1] - recipe.crop_scale[0]))
        ratio = math.exp(low + ratio_u * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draws.crop_x * (width - w + 1)), int(draws.crop_y * (height - h + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, recipe.crop_ratio[0]), recipe.crop_ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def blurred(picture: Image.Image, sigma: float, scale_x: float, scale_y: float) -> Image.Image:
    """The picture of a crop that was resized by the scales, as if the photograph had been blurred before.

    A Gaussian sampled at whole pixels has the variance that matters. Up to what one or two passes of a box cover, these do; three
    passes for wider ones (Pillow's own approximation) cost as much again.
    """
    variances = [sampled_variance(sigma) * scale**2 for scale in (scale_x, scale_y)]
    if max(variances) < SMALLEST_VARIANCE:
        return picture
    passes = math.ceil(max(variances) / BOX_VARIANCE)
    if passes > MAX_BOXES:
        return picture.filter(ImageFilter.GaussianBlur(tuple(math.sqrt(variance) for variance in variances)))
    box = ImageFilter.BoxBlur(tuple(_box_radius(variance / passes) for variance in variances))
    for _ in range(passes):
        picture = picture.filter(box)
    return picture


@lru_cache(maxsize=4096)
def sampled_variance(sigma: float) -> float:
    """Variance of a Gaussian's weights at whole pixels, normalised: what a literal blur of the photograph does."""
    if sigma > 1:
        return sigma**2
    offsets = np.arange(-8, 9, dtype=np.float64)
    weights = np.exp(-(offsets**2) / (2 * max(sigma, 1e-3) ** 2))
    return float((offsets**2 * weights).sum() / weights.sum())


def sharpened(picture: Image.Image, factor: float) -> Image.Image:
    """Pillow's sharpness: away from the 3x3 smoothing by `factor`, smoothing and blend as one kernel."""
    weights = [(1 - factor) * weight / sum(SMOOTH) for weight in SMOOTH]
    weights[4] += factor
    return picture.filter(ImageFilter.Kernel((3, 3), weights, scale=1))


def with_levels(picture: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Brightness, then contrast, as one table of levels: clipped and cut to whole levels after each, as literally."""
    if (brightness, contrast) == (1, 1):
        return picture
    offset = 0.0
    if contrast != 1:
        offset = (1 - contrast) * round(min(255.0, brightness * ImageStat.Stat(picture.convert("L")).mean[0]))
    bright = np.clip(brightness * LEVELS, 0, 255).astype(np.int64)
    return picture.point(3 * np.clip(contrast * bright + offset, 0, 255).astype(np.int64).tolist())


def saturated(picture: Image.Image, saturation: float) -> Image.Image:
    """Between grey (0), the picture (1) and beyond."""
    if saturation == 1:
        return picture
    if saturation == 0:
        return picture.convert("L").convert("RGB")
    red, green, blue = ((1 - saturation) * weight for weight in GREY)
    s = saturation
    return picture.convert("RGB", (red + s, green, blue, 0, red, green + s, blue, 0, red, green, blue + s, 0))


def _box_radius(variance: float) -> float:
    """Of the box blur, up to three pixels wide, with this variance."""
    return variance / (2 * (1 - variance))


def _blurred(picture: Image.Image, recipe: AugmentLike, draws: Draws, box: Box, px: int) -> Image.Image:
    if draws.blur >= recipe.blur_prob:
        return picture
    low, high = recipe.blur_sigma
    return blurred(picture, low + draws.sigma * (high - low), px / (box[2] - box[0]), px / (box[3] - box[1]))


def _coloured(picture: Image.Image, recipe: AugmentLike, draws: Draws) -> Image.Image:
    shift = round((2 * draws.hue - 1) * recipe.hue * 255)
    grey = draws.grey < recipe.grey_prob
    brightness, contrast, saturation = (
        1 + (2 * u - 1) * strength
        for u, strength in (
            (draws.brightness, recipe.brightness),
            (draws.contrast, recipe.contrast),
            (draws.saturation, recipe.saturation),
        )
    )
    early_grey = grey and not shift
    picture = saturated(with_levels(picture, brightness, contrast), 0 if early_grey else saturation)
    picture = hue_shifted(picture, shift)
    return saturated(picture, 0) if grey and shift else picture
