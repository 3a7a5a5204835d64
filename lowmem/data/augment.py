"""The recipe's augmentation: pixels that depend on (seed, epoch, image) alone.

The recipe's order is blur, random resized crop, sharpen, brightness, contrast, saturation, hue, grey, flip. The same pictures
come cheaper in another order: the crop is folded into one resize, the blur follows it with its sigma scaled, and brightness,
contrast, saturation and grey are one 3x4 matrix. Hue is true to HSV, by a lookup table for each of the 256 shifts that
8 bits know.
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageStat

from lowmem.data.decode import Box, oriented_size, resized_crop
from lowmem.randomness import generator

CROP_TRIES = 10
NUM_UNIFORMS = 2 * CROP_TRIES + 12
SMALLEST_SIGMA = 0.2
"""A Gaussian narrower than this moves less than 1e-5 of a pixel's weight to its neighbours."""
GREY = (0.299, 0.587, 0.114)
"""ITU-R BT.601 luma, as Pillow's "L"."""
HUE_TABLE_SIZE = 17


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


def augmented(path: Path, recipe: AugmentLike, px: int, draws: Draws) -> np.ndarray:
    """One training image, uint8 [px, px, 3]."""
    with Image.open(path) as image:
        box = crop_box(*oriented_size(image), recipe, draws)
        picture = resized_crop(image, box, px, px)
    picture = _blurred(picture, recipe, draws, box, px)
    if draws.sharpen < recipe.sharpen_prob:
        picture = ImageEnhance.Sharpness(picture).enhance(recipe.sharpen_factor)
    picture = _coloured(picture, recipe, draws)
    if draws.flip < recipe.flip_prob:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)


def evaluated(path: Path, px: int, crop_frac: float) -> np.ndarray:
    """One image for evaluation, uint8 [px, px, 3]: short side resized to px / crop_frac, then the central px x px."""
    with Image.open(path) as image:
        width, height = oriented_size(image)
        side = min(width, height) * crop_frac
        left, top = (width - side) / 2, (height - side) / 2
        return np.asarray(resized_crop(image, (left, top, left + side, top + side), px, px))


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


def hue_shifted(picture: Image.Image, shift: int) -> Image.Image:
    """RGB with its hue turned by shift / 256 of the circle."""
    return picture.filter(_hue_table(shift % 256)) if shift % 256 else picture


def _blurred(picture: Image.Image, recipe: AugmentLike, draws: Draws, box: Box, px: int) -> Image.Image:
    if draws.blur >= recipe.blur_prob:
        return picture
    low, high = recipe.blur_sigma
    sigma = low + draws.sigma * (high - low)
    radius = (sigma * px / (box[2] - box[0]), sigma * px / (box[3] - box[1]))
    return picture if max(radius) < SMALLEST_SIGMA else picture.filter(ImageFilter.GaussianBlur(radius))


def _coloured(picture: Image.Image, recipe: AugmentLike, draws: Draws) -> Image.Image:
    shift = round((2 * draws.hue - 1) * recipe.hue * 255)
    grey = draws.grey < recipe.grey_prob
    matrix = _colour_matrix(picture, recipe, draws, grey and not shift)
    if matrix is not None:
        picture = picture.convert("RGB", matrix)
    picture = hue_shifted(picture, shift)
    return picture.convert("L").convert("RGB") if grey and shift else picture


def _colour_matrix(picture: Image.Image, recipe: AugmentLike, draws: Draws, grey: bool) -> tuple[float, ...] | None:
    """Brightness, contrast, saturation and grey as the 12 coefficients of one matrix; None where nothing changes."""
    factors = [
        1 + (2 * u - 1) * strength
        for u, strength in (
            (draws.brightness, recipe.brightness),
            (draws.contrast, recipe.contrast),
            (draws.saturation, recipe.saturation),
        )
    ]
    if factors == [1, 1, 1] and not grey:
        return None
    brightness, contrast, saturation = factors
    offset = 0.0
    if contrast != 1:
        offset = (1 - contrast) * round(min(255.0, brightness * ImageStat.Stat(picture.convert("L")).mean[0]))
    luma = np.tile(np.array(GREY), (3, 1))
    colour = luma if grey else saturation * np.eye(3) + (1 - saturation) * luma
    rows = np.concatenate([brightness * contrast * colour, np.full((3, 1), offset)], axis=1)
    return tuple(float(value) for value in rows.reshape(-1))


@lru_cache(maxsize=256)
def _hue_table(shift: int) -> ImageFilter.Color3DLUT:
    """The hue turn on a grid of RGB, interpolated by Pillow; HSV as in Smith (1978)."""
    axis = np.linspace(0, 1, HUE_TABLE_SIZE)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    rgb = np.stack([red, green, blue], -1).reshape(-1, 3)
    value, low = rgb.max(1), rgb.min(1)
    chroma = value - low
    safe = np.where(chroma == 0, 1, chroma)
    r, g, b = ((value - rgb[:, channel]) / safe for channel in range(3))
    hue = np.where(rgb[:, 0] == value, b - g, np.where(rgb[:, 1] == value, 2 + r - b, 4 + g - r)) / 6
    turned = (hue + shift / 256) % 1
    channels = []
    for corner in (5, 3, 1):
        k = (corner + 6 * turned) % 6
        channels.append(value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return ImageFilter.Color3DLUT(HUE_TABLE_SIZE, np.stack(channels, -1).reshape(-1).tolist())
