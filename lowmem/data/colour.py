"""The hue turn of HSV (Smith, 1978), exact in its structure and cheap: one table look-up for each pixel.

A turn of the hue adds to each channel something that depends on the differences r - g and g - b alone: adding grey to a colour moves
neither its hue nor its chroma. So a table over the two differences holds the whole turn for one shift, and grey stays grey.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

STEP_BITS = 2
"""The table knows every fourth difference; what lies between moves by less than a level at the shifts of a colour jitter."""
STEP = 1 << STEP_BITS
OFFSET = 256 + STEP // 2
"""Differences, from -255 to 255, are shifted so that the cell around zero is centred on it."""
SIDE = (255 + OFFSET) // STEP + 1


def hue_shifted(picture: Image.Image, shift: int) -> Image.Image:
    """RGB with its hue turned by shift / 256 of the circle."""
    if shift % 256 == 0:
        return picture
    raw = picture.tobytes("raw", "RGBX")
    moved = np.take(_turns(shift % 256), _cells(np.frombuffer(raw, dtype="<u4"))).view(np.int16)
    moved += np.frombuffer(raw, dtype=np.uint8)
    np.clip(moved, 0, 255, out=moved)
    return Image.frombytes("RGB", picture.size, moved.astype(np.uint8), "raw", "RGBX")


def _cells(pixels: np.ndarray) -> np.ndarray:
    """The place in the table of each pixel, packed as 0xXXBBGGRR."""
    green = (pixels >> 8) & 255
    red_green = (pixels & 255) + OFFSET
    red_green -= green
    red_green >>= STEP_BITS
    green += OFFSET
    green -= (pixels >> 16) & 255
    green >>= STEP_BITS
    red_green *= SIDE
    red_green += green
    return red_green


@lru_cache(maxsize=256)
def _turns(shift: int) -> np.ndarray:
    """What a turn adds to red, green and blue: int16 x 4 (the last 0), seen as one int64, at (r - g) x (g - b); 130 KiB."""
    axis = STEP * np.arange(SIDE, dtype=np.float64) - 256
    red_green, green_blue = np.meshgrid(axis, axis, indexing="ij")
    colours = np.stack([red_green + green_blue, green_blue, np.zeros_like(red_green)], -1).reshape(-1, 3)
    colours -= colours.min(1, keepdims=True)
    turns = np.zeros((len(colours), 4), dtype=np.int16)
    turns[:, :3] = np.rint(_turned(colours, shift / 256) - colours)
    return turns.view(np.int64).ravel()


def _turned(rgb: np.ndarray, turn: float) -> np.ndarray:
    """HSV and back, float [N, 3] on any scale; `turn` is a share of the circle."""
    value = rgb.max(1)
    chroma = value - rgb.min(1)
    safe = np.where(chroma == 0, 1, chroma)
    r, g, b = ((value - rgb[:, channel]) / safe for channel in range(3))
    hue = np.where(rgb[:, 0] == value, b - g, np.where(rgb[:, 1] == value, 2 + r - b, 4 + g - r)) / 6
    channels = []
    for corner in (5, 3, 1):
        k = (corner + 6 * (hue + turn)) % 6
        channels.append(value - chroma * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(channels, -1)
