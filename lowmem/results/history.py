"""The log of epochs: one row each, as CSV."""

import csv
import io
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lowmem.disk import replace_file


@dataclass(frozen=True)
class EpochRow:
    """One epoch. Times in seconds; `wait_data_s` is the part of `train_s` in which the device waited for images."""

    epoch: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    val_precision: float
    val_recall: float
    val_f1: float
    lr: float
    seconds: float
    train_s: float
    eval_s: float
    wait_data_s: float
    images_per_s: float
    peak_bytes: int


def append_epoch(path: Path, row: EpochRow) -> None:
    """Add a row; an epoch that was trained again after a crash replaces its earlier row."""
    rows = [old for old in read_history(path) if old.epoch < row.epoch] if path.is_file() else []
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([field.name for field in fields(EpochRow)])
    writer.writerows(astuple(kept) for kept in [*rows, row])
    replace_file(path, text.getvalue())


def read_history(path: Path) -> list[EpochRow]:
    """All rows, oldest first."""
    with open(path, newline="", encoding="utf-8") as file:
        kinds = {field.name: field.type for field in fields(EpochRow)}
        return [EpochRow(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]
