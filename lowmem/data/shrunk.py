"""Photographs that were shrunk once: what a worker reads instead of the originals. Nothing here imports torch.

An image whose longer side is above `max_side` becomes a JPEG whose longer side is `max_side`: decoded at no less than GAP times that
size, turned as EXIF says, RGB as decode.to_rgb makes it, Lanczos, quality 95 without chroma subsampling. The original's size goes with
it, so that crops and blurs are drawn in its pixels. A smaller image is used as it is.

An entry is found by the content of its original and all that decides its bytes, so whoever makes it makes the same bytes: one that is
missing, damaged or evicted meanwhile is made again, to the same pixels.
"""

import hashlib
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, features

from lowmem.data.decode import Shrunk, oriented_size, to_rgb

GAP = 2
QUALITY, SUBSAMPLING = 95, "4:4:4"
LAYOUT = 1
"""To be raised where the bytes of an entry change for another reason than the settings named in `entry_key`."""
KEY_BYTES = 16
SIZE, CHECKSUM = struct.Struct("<II"), struct.Struct("<I")
"""What follows the JPEG: width and height of the original, and the CRC-32 of all before it."""
STALE_S = 3600.0
"""A file that was begun this long ago and never finished belongs to nobody."""
TRIM_SHARE = 64


def shrunk(data: bytes, max_side: int) -> Shrunk:
    """The image in a file's bytes, its longer side `max_side`; raises what Pillow raises."""
    with Image.open(BytesIO(data)) as image:
        width, height = oriented_size(image)
        scale = max_side / max(width, height)
        if image.format == "JPEG":
            image.draft("RGB", (int(GAP * scale * image.width), int(GAP * scale * image.height)))
        ImageOps.exif_transpose(image, in_place=True)
        picture = to_rgb(image)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    made = BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(made, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return Shrunk(made.getvalue(), width, height)


def longer_side(source: Path | BytesIO) -> int:
    """Of an image, of which only the header is read."""
    with Image.open(source) as image:
        return max(image.size)


def content_of(data: bytes) -> bytes:
    """16 bytes that stand for a file's content."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def entry_key(content: bytes, max_side: int) -> bytes:
    """The name of an entry: changes with the original's content and with all that decides the entry's bytes."""
    codec = features.version("libjpeg_turbo") or features.version("jpg")
    settings = (LAYOUT, max_side, GAP, QUALITY, SUBSAMPLING, PIL.__version__, codec)
    return hashlib.blake2b(content + repr(settings).encode(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Entry:
    """A file of the cache; `used` is the time of its last use, in seconds."""

    used: float
    num_bytes: int
    path: Path


@dataclass(frozen=True)
class Cache:
    """Entries in a folder of their own, of `limit_bytes` in all; several runs may use it at the same time."""

    folder: Path
    limit_bytes: int

    def path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / name

    def read(self, key: bytes) -> Shrunk | None:
        """None where the entry is missing or damaged."""
        try:
            data = self.path(key).read_bytes()
        except OSError:
            return None
        return _unpacked(data)

    def keep(self, key: bytes, image: Shrunk) -> int:
        """Write an entry aside and rename it; returns its bytes. Raises OSError."""
        path, data = self.path(key), _packed(image)
        partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            if not path.exists():  # Windows: another process has just written the same bytes and reads them
                raise
        return len(data)

    def touch(self, key: bytes) -> bool:
        """Note that the entry is used now; whether it is there."""
        try:
            os.utime(self.path(key))
        except OSError:
            return False
        return True

    def trim(self, since: float = float("inf")) -> int:
        """Evict the entries whose last use is longest ago until the limit is kept, but none that was used `since` then; returns the
        bytes that are left."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        left = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if left <= self.limit_bytes or entry.used >= since:
                break
            with suppress(OSError):  # open on Windows, or evicted by somebody else
                entry.path.unlink()
                left -= entry.num_bytes
        return left

    def _entries(self) -> Iterator[Entry]:
        now = time.time()
        for folder in _folders(self.folder):
            for item in os.scandir(folder):
                with suppress(OSError):
                    facts = item.stat()
                    unfinished = item.name.startswith(".") and now - facts.st_mtime < STALE_S
                    yield Entry(now if unfinished else facts.st_mtime, facts.st_size, Path(item.path))


@dataclass
class PreparedImages:
    """Callable: the image of a path and its index in a split, from the cache. `keys_N`: uint8 [N, 16], zeros for an image that is
    used as it is."""

    cache: Cache
    max_side: int
    keys_N: np.ndarray
    remade_bytes: int = 0

    def __call__(self, path: Path, index: int) -> Path | Shrunk:
        key = self.keys_N[index].tobytes()
        if not any(key):
            return path
        return self.cache.read(key) or self._made_again(path, key)

    def _made_again(self, path: Path, key: bytes) -> Shrunk:
        data = path.read_bytes()
        if entry_key(content_of(data), self.max_side) != key:
            raise ValueError("it was changed while the run went on")
        image = shrunk(data, self.max_side)
        with suppress(OSError):  # a full or read-only disk: the pixels are there all the same
            self.remade_bytes += self.cache.keep(key, image)
            if self.remade_bytes > self.cache.limit_bytes / TRIM_SHARE:
                self.remade_bytes = 0
                self.cache.trim()
        return image


@dataclass(frozen=True)
class ShrunkEachTime:
    """Callable: as PreparedImages, the same pixels without a cache: for images that are looked at once."""

    max_side: int

    def __call__(self, path: Path, index: int) -> Path | Shrunk:
        return path if longer_side(path) <= self.max_side else shrunk(path.read_bytes(), self.max_side)


def _folders(root: Path) -> list[str]:
    try:
        return [item.path for item in os.scandir(root) if item.is_dir() and len(item.name) == 2]
    except OSError:
        return []


def _packed(image: Shrunk) -> bytes:
    body = image.jpeg + SIZE.pack(image.width, image.height)
    return body + CHECKSUM.pack(zlib.crc32(body))


def _unpacked(data: bytes) -> Shrunk | None:
    jpeg_bytes = len(data) - SIZE.size - CHECKSUM.size
    if jpeg_bytes <= 0 or CHECKSUM.pack(zlib.crc32(memoryview(data)[: -CHECKSUM.size])) != data[-CHECKSUM.size :]:
        return None
    return Shrunk(data[:jpeg_bytes], *SIZE.unpack_from(data, jpeg_bytes))
