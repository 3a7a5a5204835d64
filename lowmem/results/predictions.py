"""Predictions as the CSV that a contest asks for.

UTF-8, comma-separated, one header line: `image_name` (the path under the images' folder, with /), `pred_label` (the class's name),
`probability` (6 decimals); with --top N also `pred_label_2`, `probability_2`, ... in falling order. Rows are in the order of the names
(numbers by value); an image that cannot be read comes last, with empty cells.
"""

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowmem.errors import LowmemError


@dataclass(frozen=True)
class Prediction:
    """One image's probabilities, float [K], in the order of `classes`."""

    name: str
    classes: tuple[str, ...]
    probabilities_K: np.ndarray

    def best(self, top: int) -> list[tuple[str, float]]:
        """The likeliest classes and their probabilities, best first."""
        order = np.argsort(-self.probabilities_K, kind="stable")[:top]
        return [(self.classes[index], float(self.probabilities_K[index])) for index in order]


def write_predictions(path: Path, predictions: list[Prediction], unreadable: list[str], top: int = 1) -> None:
    """One row for each image, in order; unreadable images come last, with empty labels, so that no image is missing."""
    suffixes = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    header = ["image_name", *(name for suffix in suffixes for name in (f"pred_label{suffix}", f"probability{suffix}"))]
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for prediction in predictions:
                cells = [cell for label, probability in prediction.best(top) for cell in (label, f"{probability:.6f}")]
                writer.writerow([prediction.name, *cells])
            writer.writerows([name] + [""] * (2 * top) for name in unreadable)
    except OSError as error:
        raise LowmemError(f"--out {path}: cannot be written: {error.strerror}.") from None


def zip_predictions(path: Path) -> Path:
    """The CSV as the only file of an archive beside it, for contests that take their submissions zipped; the same bytes each time."""
    archive = path.with_suffix(".zip")
    try:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            entry = zipfile.ZipInfo(path.name)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            file.writestr(entry, path.read_bytes())
    except OSError as error:
        raise LowmemError(f"{archive}: cannot be written: {error.strerror}.") from None
    return archive
