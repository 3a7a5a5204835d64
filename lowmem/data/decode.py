"""File -> RGB pixels: every format, orientation and colour model that a folder of photographs holds.

A JPEG is decoded at a reduced scale (libjpeg's 1/2, 1/4, 1/8) where the crop allows. Transparency is pasted on white.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 300_000_000
"""Larger images are refused as decompression bombs; Pillow's own limit is 179 million."""
ORIENTATION = 0x0112
TRANSPOSED = frozenset({5, 6, 7, 8})
JPEG_END = b"\xff\xd9"
JPEG_TAIL_BYTES = 4096

Box = tuple[float, float, float, float]

Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Shrunk:
    """A JPEG in memory that stands for a larger image, whose oriented size is width x height."""

    jpeg: bytes
    width: int
    height: int


@contextmanager
def opened(source: Path | Shrunk) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Context: an image of which only the header is read, and the oriented size of the original that it stands for."""
    if isinstance(source, Shrunk):
        with Image.open(BytesIO(source.jpeg)) as image:
            yield image, (source.width, source.height)
    else:
        with Image.open(source) as image:
            yield image, oriented_size(image)


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation is applied; only the header is read."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in TRANSPOSED else (width, height)


def resized_crop(
    image: Image.Image, box: Box, width: int, height: int, full_size: tuple[int, int] | None = None
) -> Image.Image:
    """RGB pixels of `box` (left, top, right, bottom, in oriented pixels), resized to width x height.

    One bilinear, antialiased resize from the smallest decoded scale that still has a pixel for each pixel of the result. `full_size`:
    of the original in whose pixels the box is, where the image is a smaller one.
    """
    size = oriented_size(image)
    full_width, full_height = full_size or size
    left, top, right, bottom = box
    if image.format == "JPEG":
        x, y = size[0] / full_width, size[1] / full_height
        scale = min(x * (right - left) / width, y * (bottom - top) / height)
        if scale >= 2:
            image.draft("RGB", (int(image.width / scale), int(image.height / scale)))
    ImageOps.exif_transpose(image, in_place=True)  # otherwise a copy of the whole photograph, turned or not
    image = to_rgb(image)
    x, y = image.width / full_width, image.height / full_height
    inner = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box=inner)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; transparent parts become white."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.clip(np.nan_to_num(np.asarray(image)), 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def why_unreadable(path: Path) -> str | None:
    """The reason why a file cannot be trained on; None where it can.

    Pillow's own `verify` finds no truncated JPEG, so the end mark is looked for and the image is decoded at 1/8 scale: a
    quarter of a full decode's cost.
    """
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            if image.format == "JPEG" and not _has_end_mark(path):
                return "truncated: the JPEG end mark is missing"
            image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Image.UnidentifiedImageError:
        return "not an image"
    except Image.DecompressionBombError:
        return f"more than {MAX_PIXELS:,} pixels"
    except Exception as error:  # a hostile file provokes any error in any parser
        return f"{type(error).__name__}: {error}"
    return None


def _has_end_mark(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - JPEG_TAIL_BYTES))
        return JPEG_END in file.read()
