"""F11: image files as they come out of broken cameras, interrupted downloads, other programs and malice, and the count of those that
are dealt with: a file that cannot be read is named with its reason before training, any other gives pixels, and no file is changed."""

import io
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from lowmem.data.augment import Draws, augmented, evaluated
from lowmem.data.decode import why_unreadable
from lowmem.recipe import load_recipe

FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tiff")
MODES = {"jpg": ("RGB", "L", "CMYK", "YCbCr"), "png": ("RGB", "L", "1", "P", "LA", "RGBA", "I;16"), "webp": ("RGB", "RGBA"),
         "gif": ("P", "L"), "bmp": ("RGB", "L", "1", "P"), "tiff": ("RGB", "CMYK", "I;16", "F", "LAB", "1", "RGBA")}  # fmt: skip
MUST_BE_READ, MUST_BE_NAMED, EITHER = "must be read", "must be named", "either"
SLOWEST_S = 10.0
NUM_CUTS = {"jpg": 40, "png": 20, "webp": 10, "gif": 10, "bmp": 6, "tiff": 10}
File = tuple[str, bytes, str]
"""(name, content, what is expected of it)."""


@dataclass
class Score:
    injected: int = 0
    survived: int = 0
    named: int = 0
    """Files that were left out, with a reason."""
    by_kind: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def as_dict(self) -> dict[str, object]:
        return vars(self) | {"by_kind": dict(self.by_kind), "slowest_s": round(self.slowest_s, 2)}


def try_files(folder: Path, seed: int) -> Score:
    """Every hostile file, alone in a folder, through the check and, where it passes, through decoding and augmentation."""
    score, recipe = Score(), load_recipe("seresnextaa101d_32x8d").augment
    for number, (name, content, expected) in enumerate(hostile_files(random.Random(seed))):
        path = folder / f"{number}-{name}"
        path.write_bytes(content)
        started = time.perf_counter()
        problem, named = _outcome(path, expected, lambda p: augmented(p, recipe, 32, Draws(0, 1, 0)))
        score.slowest_s = max(score.slowest_s, seconds := time.perf_counter() - started)
        if path.read_bytes() != content:
            problem = "the file was changed"
        elif seconds > SLOWEST_S:
            problem = f"it took {seconds:.0f} s"
        score.injected += 1
        score.named += named
        score.by_kind[name.partition(".")[0]] += 1
        if problem:
            score.failures.append(f"{name}: {problem}")
        else:
            score.survived += 1
    return score


def hostile_files(draw: random.Random) -> Iterator[File]:
    yield from _cut_and_zeroed(draw)
    yield from _flipped(draw)
    yield from _every_mode()
    yield from _other_contents(draw)
    yield from _turned_and_animated()
    yield from _bombs()


def _outcome(path: Path, expected: str, train_on: Callable[[Path], np.ndarray]) -> tuple[str, bool]:
    """(what went wrong, empty if nothing did; whether the file was named as unreadable)."""
    reason = why_unreadable(path)
    if reason is not None:
        good = bool(reason.strip()) and expected != MUST_BE_READ
        return ("" if good else f"left out: {reason!r}"), True
    if expected == MUST_BE_NAMED:
        return "passed the check", False
    try:
        pixels = (evaluated(path, 32, 0.875), train_on(path))
    except Exception as error:  # whatever a file provokes that the check let through
        return f"passed the check, and then {type(error).__name__}: {error}", False
    wrong = [p for p in pixels if p.shape != (32, 32, 3) or p.dtype != np.uint8]
    return ("pixels of another shape" if wrong else ""), False


def _photo(width: int = 96, height: int = 64, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(width * height).normal(128, 50, (height, width, 3))
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    return image.convert(mode)


def _bytes(image: Image.Image, suffix: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def _cut_and_zeroed(draw: random.Random) -> Iterator[File]:
    """Interrupted downloads, and what some file systems leave after a power loss."""
    for suffix, num in NUM_CUTS.items():
        whole = _bytes(_photo(), suffix)
        for _ in range(num):
            cut = draw.randrange(1, len(whole) - len(whole) // 20)
            # A TIFF or WebP may hold nothing of worth where it is cut, so only JPEG and PNG must be found out.
            expected = MUST_BE_NAMED if suffix in ("jpg", "png") else EITHER
            yield f"truncated.{suffix}", whole[:cut], expected
            zeroed_is_noticed = MUST_BE_NAMED if suffix == "jpg" else EITHER
            yield f"zero_tailed.{suffix}", whole[:cut].ljust(len(whole), b"\0"), zeroed_is_noticed


def _flipped(draw: random.Random) -> Iterator[File]:
    for suffix in FORMATS:
        whole = bytearray(_bytes(_photo(), suffix))
        for _ in range(8):
            damaged = whole.copy()
            for _ in range(draw.randint(1, 30)):
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            yield f"flipped_bits.{suffix}", bytes(damaged), EITHER


def _every_mode() -> Iterator[File]:
    for suffix, modes in MODES.items():
        for mode in modes:
            yield f"mode_{mode.replace(';', '')}.{suffix}", _bytes(_photo(mode=mode), suffix), MUST_BE_READ
    for width, height in ((1, 1), (1, 400), (400, 1), (3, 2000)):
        yield f"thin_{width}x{height}.png", _bytes(_photo(width, height), "png"), MUST_BE_READ
        yield f"thin_{width}x{height}.jpg", _bytes(_photo(width, height), "jpg"), MUST_BE_READ
    palette = _photo(mode="P")
    yield "palette_with_alpha.png", _bytes(palette, "png", transparency=bytes(range(256))), MUST_BE_READ
    yield "progressive.jpg", _bytes(_photo(), "jpg", progressive=True), MUST_BE_READ


def _other_contents(draw: random.Random) -> Iterator[File]:
    """Files that are something else than their name says."""
    for suffix in FORMATS:
        yield f"empty.{suffix}", b"", MUST_BE_NAMED
        yield f"html.{suffix}", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", MUST_BE_NAMED
        yield f"noise.{suffix}", draw.randbytes(5000), MUST_BE_NAMED
        yield f"header_only.{suffix}", _bytes(_photo(), suffix)[:12], MUST_BE_NAMED
        other = FORMATS[(FORMATS.index(suffix) + 1) % len(FORMATS)]
        yield f"wrong_name.{suffix}", _bytes(_photo(), other), MUST_BE_READ
        yield f"appended.{suffix}", _bytes(_photo(), suffix) + draw.randbytes(100), MUST_BE_READ
    yield "zip.jpg", b"PK\x03\x04" + draw.randbytes(500), MUST_BE_NAMED
    yield "text.png", b"ein Bild, sozusagen", MUST_BE_NAMED
    yield "nothing_but_zeros.jpg", bytes(10_000), MUST_BE_NAMED


def _turned_and_animated() -> Iterator[File]:
    for orientation in range(0, 12):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"turned_{orientation}.jpg", _bytes(_photo(), "jpg", exif=exif), MUST_BE_READ
    yield "broken_exif.jpg", _bytes(_photo(), "jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), EITHER
    frames = [_photo(96, 64 + step).resize((96, 64)) for step in range(5)]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"save_all": True, "append_images": frames[1:]}
        yield f"animated.{suffix}", _bytes(frames[0], suffix, **options), MUST_BE_READ


def _bombs() -> Iterator[File]:
    """Small files that claim, or unpack to, far too much."""
    for side in (50_000, 2**31 - 1):
        yield f"bomb_{side}.png", _png(side, side, zlib.compress(bytes(1000))), MUST_BE_NAMED
    yield "bomb_65535.gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6) + b";", MUST_BE_NAMED
    yield "claims_more_than_it_holds.png", _png(3000, 3000, zlib.compress(bytes(1000))), MUST_BE_NAMED
    chunk = b"key\0\0" + zlib.compress(bytes(80_000_000), 9)
    yield "text_bomb.png", _png(8, 8, zlib.compress(bytes(8 * 25)), (b"zTXt", chunk)), EITHER


def _png(width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", data), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)
