"""An image folder: what is in it, what can be read, and how it is split. Nothing is ever written there.

Layouts: DIR/train/CLASS/*, DIR/val/CLASS/* and optionally DIR/test/*; or DIR/CLASS/*, split by the recipe's `val_fraction`.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lowmem.data.decode import SUFFIXES
from lowmem.data.readable import Checked, Tell, check_files
from lowmem.data.shrunk import Cache
from lowmem.data.split import Split, packed_split
from lowmem.errors import LowmemError
from lowmem.randomness import key

SPLITS = ("train", "val", "test")
MAX_UNREADABLE_FRAC = 0.01
NUM_LISTED, NUM_ENDS = 20, 5
IMBALANCE_RATIO = 10
UNLABELLED = -1


@dataclass(frozen=True)
class Dataset:
    """What a run trains on. `unreadable` files (name, reason) are left out of the splits; `cache` is where its shrunk images are."""

    root: Path
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = field(default=())
    cache: Cache | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any name, size or label of an image, not with the order in which they were listed."""
        digest = hashlib.blake2b(digest_size=16)
        for line in sorted(self.entries()):
            digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
        return digest.hexdigest()

    def entries(self) -> Iterator[str]:
        """One line for each image: split, label, size in bytes, name."""
        for which, split in (("train", self.train), ("val", self.val)):
            for index, name in enumerate(split.names()):
                yield f"{which}\t{self.classes[split.labels[index]]}\t{(split.root / name).stat().st_size}\t{name}"


def embedded_images() -> Path:
    """The images that ship with lowmem: 500 pictures of clip art in 10 classes."""
    return Path(__file__).parent.parent / "samples" / "clipart10"


def open_dataset(
    root: Path, val_fraction: float, seed: int, tell: Tell | None = None, cache_dir: Path | None = None
) -> Dataset:
    """Scan and check an image folder; raises LowmemError where it cannot be trained on.

    `tell(done, total)` hears of the check's progress; `cache_dir` keeps its results (by path, size and time).
    """
    if not root.is_dir():
        raise LowmemError(
            f"--data {root}: there is no such folder."
            if not root.exists()
            else f"--data {root}: is a file. Give the folder."
        )
    folders = {name: root / name for name in SPLITS if (root / name).is_dir()}
    if "train" in folders:
        named = {name: _scan_classes(root, folder) for name, folder in folders.items() if name != "test"}
        test_names = _scan_files(root, folders["test"]) if "test" in folders else []
    else:
        named, test_names = {"all": _scan_classes(root, root)}, []
    classes = _classes_of(root, named)
    checked = check_files(
        root,
        [name for table in named.values() for names in table.values() for name in names] + test_names,
        tell,
        cache_dir,
    )
    _refuse_if_many_unreadable(root, checked)
    readable = {
        which: {label: [n for n in names if n not in checked.reasons] for label, names in table.items()}
        for which, table in named.items()
    }
    if "train" not in folders:
        readable = _split_classes(readable["all"], val_fraction, seed)
    elif "val" not in folders:
        readable = _split_classes(readable["train"], val_fraction, seed)
    _refuse_class_without_images(root, classes, readable["train"])
    dataset = Dataset(
        root,
        classes,
        _split(root, readable["train"], classes),
        _split(root, readable["val"], classes),
        _flat_split(root, [n for n in test_names if n not in checked.reasons]) if test_names else None,
        tuple(sorted(checked.reasons.items())),
    )
    return replace(dataset, warnings=(*_empty_classes(named, classes), *_warnings(dataset)))


def class_counts(dataset: Dataset) -> str:
    """Training and validation images of each class, in words; of many classes, the smallest and the largest."""
    counts = zip(*(split.counts(len(dataset.classes)) for split in (dataset.train, dataset.val)))
    rows = [(f"{label} {train}+{val}", int(train)) for label, (train, val) in zip(dataset.classes, counts)]
    if len(rows) <= NUM_LISTED:
        return ", ".join(text for text, _ in rows)
    rows.sort(key=lambda row: row[1])
    few, many = (", ".join(text for text, _ in part) for part in (rows[:NUM_ENDS], rows[-NUM_ENDS:]))
    return f"{few}, ..., {many}"


def labelled_images(root: Path, classes: tuple[str, ...]) -> Split:
    """A folder of class folders, for evaluation under the given class order; raises LowmemError for other classes."""
    if not root.is_dir():
        raise LowmemError(f"{root}: there is no such folder.")
    table = _scan_classes(root, root)
    unknown = sorted(set(table) - set(classes), key=natural_key)
    if unknown or not table:
        known = ", ".join(classes[:5]) + ("..." if len(classes) > 5 else "")
        raise LowmemError(
            f"{root}: {'has no class folders' if not table else f'{unknown[0]!r} is not a class of this classifier'}. Its classes: {known}."
        )
    return _split(root, table, classes)


def num_classes_and_images(root: Path, val_fraction: float) -> tuple[int, int]:
    """Classes and training images of a data folder by its listing alone, without reading an image; raises LowmemError."""
    if not root.is_dir():
        raise LowmemError(f"--data {root}: there is no such folder.")
    split = (root / "train").is_dir()
    table = _scan_classes(root, root / "train" if split else root)
    classes = _classes_of(root, {"train": table})
    num_images = sum(len(names) for names in table.values())
    held_out = 0 if split and (root / "val").is_dir() else round(val_fraction * num_images)
    return len(classes), num_images - held_out


def unlabelled_images(root: Path) -> Split:
    """Every image file in a folder and below it, in natural order; raises LowmemError where there is none."""
    if root.is_file():
        return _flat_split(root.parent, [root.name])
    names = _scan_files(root, root) if root.is_dir() else []
    if not names:
        raise LowmemError(f"{root}: holds no images ({', '.join(sorted(SUFFIXES))}).")
    return _flat_split(root, names)


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sorts 0, 1, 2, ..., 10 and a, a2, a10 as people do."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts], name


def _scan_classes(root: Path, folder: Path) -> dict[str, list[str]]:
    """Class folder -> names of its image files, relative to `root`, in natural order."""
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return {child.name: _scan_files(root, child) for child in sorted(children, key=lambda c: natural_key(c.name))}


def _scan_files(root: Path, folder: Path) -> list[str]:
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = Path(parent).relative_to(root).as_posix()
        for file in files:
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                names.append(file if prefix == "." else f"{prefix}/{file}")
    return sorted(names, key=natural_key)


def _classes_of(root: Path, named: dict[str, dict[str, list[str]]]) -> tuple[str, ...]:
    found = {label for table in named.values() for label, names in table.items() if names}
    train = named.get("train", named.get("all", {}))
    if not found:
        raise LowmemError(
            f"--data {root}: holds no images in class folders. Expected {root}/train/CLASS/*.jpg, or {root}/CLASS/*.jpg."
        )
    if len(found) < 2:
        raise LowmemError(
            f"--data {root}: has one class only ({next(iter(found))}); a classifier needs two. Images belong into one folder per class."
        )
    untrained = sorted((label for label in found if not train.get(label)), key=natural_key)
    if untrained:
        raise LowmemError(
            f"--data {root}: val/{untrained[0]} has images but train/{untrained[0]} has none, so it cannot be learnt. Add some, or remove val/{untrained[0]}."
        )
    return tuple(sorted(found, key=natural_key))


def _refuse_if_many_unreadable(root: Path, checked: Checked) -> None:
    if len(checked.reasons) <= MAX_UNREADABLE_FRAC * checked.num_files:
        return
    listed = "".join(f"\n  {name}: {reason}" for name, reason in sorted(checked.reasons.items())[:NUM_LISTED])
    more = f"\n  and {len(checked.reasons) - NUM_LISTED} more" if len(checked.reasons) > NUM_LISTED else ""
    raise LowmemError(
        f"--data {root}: {len(checked.reasons)} of {checked.num_files} images cannot be read, which is more than "
        f"{MAX_UNREADABLE_FRAC:.0%}. Repair or remove them:{listed}{more}"
    )


def _split_classes(table: dict[str, list[str]], val_fraction: float, seed: int) -> dict[str, dict[str, list[str]]]:
    """Stratified: in each class, the images whose keyed hash is lowest go to val, whatever the order of listing."""
    train, val = {}, {}
    for label, names in table.items():
        shuffled = sorted(names, key=lambda name: key(seed, f"split/{name}"))
        num_val = min(max(1, round(val_fraction * len(names))), len(names) - 1) if len(names) > 1 else 0
        held = set(shuffled[:num_val])
        train[label] = [name for name in names if name not in held]
        val[label] = [name for name in names if name in held]
    return {"train": train, "val": val}


def _split(root: Path, table: dict[str, list[str]], classes: tuple[str, ...]) -> Split:
    numbers = {label: number for number, label in enumerate(classes)}
    names = [name for label in classes for name in table.get(label, ())]
    labels = [numbers[label] for label in classes for _ in table.get(label, ())]
    return packed_split(root, names, labels)


def _flat_split(root: Path, names: list[str]) -> Split:
    return packed_split(root, names, [UNLABELLED] * len(names))


def _refuse_class_without_images(root: Path, classes: tuple[str, ...], train: dict[str, list[str]]) -> None:
    for label in classes:
        if not train.get(label):
            raise LowmemError(
                f"--data {root}: none of the training images of class {label} can be read. Repair them, or remove the class."
            )


def _empty_classes(named: dict[str, dict[str, list[str]]], classes: tuple[str, ...]) -> Iterator[str]:
    """Folders that look like classes and hold no image in any split."""
    empty = sorted({label for table in named.values() for label in table} - set(classes), key=natural_key)
    if empty:
        more = ", ..." if len(empty) > NUM_ENDS else ""
        yield (
            f"Class folders without an image are left out, {len(empty)} of {len(empty) + len(classes)}: "
            f"{', '.join(empty[:NUM_ENDS])}{more}. Images end in {', '.join(sorted(SUFFIXES))}."
        )


def _warnings(dataset: Dataset) -> Iterator[str]:
    num_classes = len(dataset.classes)
    train, val = dataset.train.counts(num_classes), dataset.val.counts(num_classes)
    unseen = [label for label, count in zip(dataset.classes, val) if not count]
    if unseen:
        yield f"{len(unseen)} of {num_classes} classes have no validation image ({', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''})."
    if train.max() >= IMBALANCE_RATIO * train.min():
        few, many = dataset.classes[int(train.argmin())], dataset.classes[int(train.argmax())]
        yield f"Unbalanced classes: {few} has {train.min()} training images, {many} has {train.max()}. loss.class_weights=reciprocal weighs them."
    twins = list(_duplicates(dataset))
    if twins:
        first = twins[0]
        yield f"{len(twins)} validation images are also in train, by content ({first[1]} = {first[0]}): the validation flatters."


def _duplicates(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """(train name, val name) with equal bytes; only files of equal size are read."""
    by_size: dict[int, list[str]] = {}
    for name in dataset.val.names():
        by_size.setdefault((dataset.root / name).stat().st_size, []).append(name)
    by_content: dict[bytes, str] = {}
    rivals = [name for name in dataset.train.names() if (dataset.root / name).stat().st_size in by_size]
    for name in rivals:
        by_content.setdefault(_content(dataset.root / name), name)
    sizes = {(dataset.root / name).stat().st_size for name in rivals}
    for size in sorted(sizes):
        for name in by_size[size]:
            twin = by_content.get(_content(dataset.root / name))
            if twin is not None:
                yield twin, name


def _content(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
