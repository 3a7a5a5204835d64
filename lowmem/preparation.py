"""`lowmem prepare`: the images of a data folder shrunk once, ahead of the runs that will read them so."""

import time
from dataclasses import dataclass
from pathlib import Path

from lowmem.data.folder import open_dataset
from lowmem.data.prepared import open_cache, with_prepared
from lowmem.data.shrunk import PreparedImages
from lowmem.progress import open_progress
from lowmem.recipe import DataRecipe


@dataclass(frozen=True)
class PrepareRequest:
    """The options of `lowmem prepare`."""

    data: Path
    max_side: int
    cache: Path | None = None
    cache_bytes: str | None = None


def prepare_folder(request: PrepareRequest) -> None:
    """Make what is not in the cache yet; raises LowmemError where the cache cannot hold the images."""
    cache, root = open_cache(request.cache, request.cache_bytes), request.data.resolve()
    with open_progress() as progress:
        dataset = open_dataset(root, DataRecipe().val_fraction, 0, progress.checking)
        for name, reason in dataset.unreadable:
            progress.warn(f"left out: {name}: {reason}")
        began = time.monotonic()
        try:
            dataset = with_prepared(dataset, request.max_side, cache, progress.shrinking)
        except KeyboardInterrupt:
            progress.close()
            progress.say("Stopped; what was shrunk so far is kept, and the same command goes on from there.")
            raise
        num_shrunk = sum(_num_shrunk(split.reader) for split in (dataset.train, dataset.val))
        num_images = len(dataset.train) + len(dataset.val)
        progress.say(
            f"{num_shrunk} of {num_images} images are read shrunk, the others as they are: {cache.folder} "
            f"({time.monotonic() - began:.1f} s)"
        )
        options = "" if request.cache is None else f" --cache {request.cache}"
        progress.say(
            f"Train on them: lowmem train --data {request.data} --set data.max_side={request.max_side}{options}"
        )


def _num_shrunk(reader: object) -> int:
    assert isinstance(reader, PreparedImages)
    return int(reader.keys_N.any(axis=1).sum())
