"""The images of a run, shrunk once at its start: what is not in the cache yet is made in parallel, the rest is found by path, size and
time of change.

The cache is bounded: entries whose last use is longest ago go first, but never those of the images at hand. Images that do not fit by
themselves stop the preparation, with the size that they need.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import platformdirs

from lowmem.data.folder import Dataset
from lowmem.data.readable import Tell
from lowmem.data.remembered import Remembered, stamp
from lowmem.data.shrunk import KEY_BYTES, Cache, PreparedImages, content_of, entry_key, longer_side, shrunk
from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.recipe import DataRecipe
from lowmem.sizes import GIB, format_size, parse_size, short_size

DEFAULT_BYTES = 20 * GIB
CHUNK = 64
DETAIL = 1.43
"""Longer side over training size below which detail suffers (benchmarks/results/prepared.json)."""
CLOCK_S = 1.0
"""The clock of files may be behind by a little."""
AS_IT_IS = bytes(KEY_BYTES)


@dataclass(frozen=True)
class Facts:
    """Of one original: its content and its longer side."""

    content: bytes
    longer: int

    def __str__(self) -> str:
        return f"{self.content.hex()} {self.longer}"

    @staticmethod
    def parsed(text: str) -> "Facts":
        content, longer = text.split()
        return Facts(bytes.fromhex(content), int(longer))


@dataclass(frozen=True)
class Done:
    """One image: its facts, its entry's key and the bytes that were written for it."""

    facts: Facts
    key: bytes
    new_bytes: int = 0


def open_cache(folder: Path | None = None, limit: str | None = None, before: Cache | None = None) -> Cache:
    """The cache in a folder and with a limit that were given, or as `before`, by default the user's own; raises LowmemError for a
    limit that is no size."""
    usual = before or Cache(Path(platformdirs.user_cache_dir("lowmem")) / "prepared", DEFAULT_BYTES)
    return Cache((folder or usual.folder).absolute(), parse_size(limit) if limit else usual.limit_bytes)


def with_prepared(dataset: Dataset, max_side: int, cache: Cache, tell: Tell | None = None) -> Dataset:
    """The dataset with its training and validation images read through the cache; raises LowmemError where that cannot hold them."""
    names = [*dataset.train.names(), *dataset.val.names()]
    keys_N = prepared_keys(dataset.root, names, max_side, cache, tell)
    train_N, val_N = keys_N[: len(dataset.train)], keys_N[len(dataset.train) :]
    return replace(
        dataset,
        train=replace(dataset.train, reader=PreparedImages(cache, max_side, train_N)),
        val=replace(dataset.val, reader=PreparedImages(cache, max_side, val_N)),
        cache=cache,
    )


def prepared_keys(root: Path, names: list[str], max_side: int, cache: Cache, tell: Tell | None = None) -> np.ndarray:
    """Keys of the images' entries, uint8 [N, 16], zeros where an image is used as it is; makes those that are missing. `tell` hears
    (images done, images in all)."""
    _refuse_folder(cache.folder, root)
    began, keys = time.time() - CLOCK_S, []
    num_bytes = cache.trim()
    memory = Remembered(cache.folder / "originals.sqlite")
    pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="lowmem-prepare")
    try:
        for start in range(0, len(names), CHUNK):
            paths = [root / name for name in names[start : start + CHUNK]]
            stamps = [stamp(path) for path in paths]
            known = memory.recall(stamps)
            facts = [Facts.parsed(known[seen]) if seen in known else None for seen in stamps]
            done = list(pool.map(lambda path, fact: _prepared(path, fact, max_side, cache), paths, facts))
            memory.learn((seen, str(item.facts)) for seen, item, old in zip(stamps, done, facts) if item.facts != old)
            keys += [item.key for item in done]
            num_bytes += sum(item.new_bytes for item in done)
            if num_bytes > cache.limit_bytes:
                num_bytes = cache.trim(since=began)
            _refuse_too_many(num_bytes, len(keys), len(names), max_side, cache)
            if tell is not None:
                tell(len(keys), len(names))
    finally:
        pool.shutdown(cancel_futures=True)
        memory.close()
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES)


def detail_warning(data: DataRecipe) -> str | None:
    """Where images are shrunk so far that detail suffers."""
    px = max(data.train_px, data.val_px)
    wanted = int(-(-DETAIL * px // 1))
    if not 0 < data.max_side < wanted:
        return None
    return f"data.max_side={data.max_side} is less than {DETAIL} x {px} px: detail suffers. Use --set data.max_side={wanted} or more."


def _prepared(path: Path, facts: Facts | None, max_side: int, cache: Cache) -> Done:
    try:
        found = None if facts is None else _found(facts, max_side, cache)
        if found is not None:
            return found
        data = path.read_bytes()
        facts = Facts(content_of(data), longer_side(BytesIO(data)))
        found = _found(facts, max_side, cache)
        if found is not None:
            return found
        key, image = entry_key(facts.content, max_side), shrunk(data, max_side)
    except Exception as error:  # whatever a file that changed since it was checked provokes in a decoder
        raise LowmemError(f"{path} can no longer be read: {type(error).__name__}: {error}.") from error
    try:
        return Done(facts, key, cache.keep(key, image))
    except OSError as error:
        raise LowmemError(
            f"--cache {cache.folder}: cannot be written: {error.strerror}. Name another folder with --cache, or make room."
        ) from error


def _found(facts: Facts, max_side: int, cache: Cache) -> Done | None:
    if facts.longer <= max_side:
        return Done(facts, AS_IT_IS)
    key = entry_key(facts.content, max_side)
    return Done(facts, key) if cache.touch(key) else None


def _refuse_folder(folder: Path, root: Path) -> None:
    if folder.resolve().is_relative_to(root.resolve()):
        raise LowmemError(
            f"--cache {folder}: lies in the data folder, where nothing is ever written. Name another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LowmemError(
            f"--cache {folder}: cannot be made: {error.strerror}. Name another folder with --cache."
        ) from error


def _refuse_too_many(num_bytes: int, num_done: int, num_images: int, max_side: int, cache: Cache) -> None:
    if num_bytes <= cache.limit_bytes:
        return
    needed = 1.1 * num_bytes * num_images / num_done
    cache.trim()
    raise LowmemError(
        f"--cache-bytes {short_size(cache.limit_bytes)} is too small: what is in use takes {format_size(num_bytes)} after "
        f"{num_done} of {num_images} images with a longer side of {max_side} px. Use --cache-bytes {short_size(needed)}, or a smaller data.max_side."
    )
