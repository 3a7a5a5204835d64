"""The file index of a split, in three arrays, so that a million names cost about 50 MB and no worker copies them by counting references."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowmem.data.decode import Shrunk

Reader = Callable[[Path, int], Path | Shrunk]
"""(path, index) -> the file to read, or an image in memory that stands for it."""


@dataclass(frozen=True)
class Split:
    """Images and labels in a fixed order: names as one array of bytes, cut at `offsets`; `labels` is int64 [N], -1 where there is none.
    `reader` None: images are read from their own files."""

    root: Path
    packed_paths: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    reader: Reader | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Path relative to the data folder, with forward slashes."""
        return (
            self.packed_paths[self.offsets[index] : self.offsets[index + 1]]
            .tobytes()
            .decode("utf-8", "surrogateescape")
        )

    def path(self, index: int) -> Path:
        return self.root / self.name(index)

    def source(self, index: int) -> Path | Shrunk:
        """What to decode for an image."""
        path = self.path(index)
        return path if self.reader is None else self.reader(path, index)

    def names(self) -> Iterator[str]:
        return (self.name(index) for index in range(len(self)))

    def counts(self, num_classes: int) -> np.ndarray:
        """Images of each class, int64 [K]."""
        return np.bincount(self.labels[self.labels >= 0], minlength=num_classes)


def packed_split(root: Path, names: Iterable[str], labels: Iterable[int]) -> Split:
    """The split of names, relative to `root`, and their labels."""
    packed, lengths = bytearray(), []
    for name in names:
        encoded = name.encode("utf-8", "surrogateescape")
        packed += encoded
        lengths.append(len(encoded))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Split(root, np.frombuffer(bytes(packed), dtype=np.uint8), offsets, np.fromiter(labels, dtype=np.int64))
