"""What a CUDA card takes beside the tensors (context, convolution workspace, the allocator's rounding and fragmentation), fitted to
measurements on the card and kept in the user's cache, by device and versions.

Measured rows give the predicted bytes of tensors, the most that the allocator reserved, and what the process held. The fit is the
smallest allowance `workspace + share x predicted` that would have been enough for every row, and the largest context; it is made on half of the
models and checked on the others.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import platformdirs
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy.optimize import linprog

from lowmem.disk import replace_file
from lowmem.errors import LowmemError

MAX_SHARE = 0.25
"""More than this is no rounding."""
MIN_ROWS = 4


@dataclass(frozen=True)
class MemoryRow:
    """One measured plan; `process_bytes` is None where the driver does not tell."""

    model: str
    predicted_bytes: int
    reserved_bytes: int
    process_bytes: int | None = None


class Calibration(BaseModel):
    """What to take off a budget on one device."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: str
    versions: str
    num_rows: int = Field(ge=1)
    context_bytes: int | None = Field(ge=0)
    """None where the driver does not tell."""
    workspace_bytes: int = Field(ge=0)
    rounding_frac: float = Field(ge=0, le=MAX_SHARE)

    def process_pred_bytes(self, predicted_bytes: int) -> int:
        """What a process whose tensors peak at `predicted_bytes` will hold."""
        return (self.context_bytes or 0) + self.workspace_bytes + round((1 + self.rounding_frac) * predicted_bytes)


@dataclass(frozen=True)
class Check:
    """Errors of the prediction as shares of what was measured."""

    num_rows: int
    median_error: float
    p95_error: float
    under_frac: float
    """Share of rows whose memory was under-estimated."""


def memory_rows(report: dict[str, Any]) -> list[MemoryRow]:
    """The rows of a report of benchmarks/gpu.py; those measured as on a small card where there are any."""
    rows = [row for row in report["rows"] if row["reserved_bytes"] and row["predicted_bytes"] and not row["error"]]
    held_down = [row for row in rows if row["held_down"]]
    return [
        MemoryRow(f"{row['model']} {row['px']} px", row["predicted_bytes"], row["reserved_bytes"], row["process_bytes"])
        for row in held_down or rows
    ]


def fit(rows: Sequence[MemoryRow], device: str, versions: str) -> Calibration:
    """The smallest allowances that were enough for every row; raises LowmemError where there are too few rows."""
    if len(rows) < MIN_ROWS:
        raise LowmemError(
            f"{len(rows)} measured rows are too few to calibrate {device}; at least {MIN_ROWS} are needed."
        )
    predicted = np.array([row.predicted_bytes for row in rows], dtype=float)
    extra = np.array([row.reserved_bytes for row in rows], dtype=float) - predicted
    scale = predicted.max()
    found = linprog(
        [len(rows), predicted.sum() / scale],
        A_ub=np.stack([-np.ones(len(rows)), -predicted / scale], axis=1),
        b_ub=-extra / scale,
        bounds=[(0, None), (0, MAX_SHARE)],
    )
    contexts = [row.process_bytes - row.reserved_bytes for row in rows if row.process_bytes is not None]
    return Calibration(
        device=device,
        versions=versions,
        num_rows=len(rows),
        context_bytes=max(0, *contexts, 0) if contexts else None,
        workspace_bytes=int(np.ceil(found.x[0] * scale)),
        rounding_frac=float(found.x[1]),
    )


def check(calibration: Calibration, rows: Iterable[MemoryRow]) -> Check:
    """How far the prediction is off on rows that it was not fitted to."""
    errors = [_error(calibration, row) for row in rows]
    if not errors:
        return Check(0, 0.0, 0.0, 0.0)
    sizes = sorted(abs(error) for error in errors)
    p95 = sizes[min(len(sizes) - 1, int(np.ceil(0.95 * len(sizes))) - 1)]
    return Check(len(errors), median(sizes), p95, sum(error < 0 for error in errors) / len(errors))


def halves(rows: Iterable[MemoryRow]) -> tuple[list[MemoryRow], list[MemoryRow]]:
    """Rows to fit to and rows to check on; no model is in both."""
    by_model: dict[str, list[MemoryRow]] = {}
    for row in rows:
        by_model.setdefault(row.model, []).append(row)
    sides: tuple[list[MemoryRow], list[MemoryRow]] = ([], [])
    for number, name in enumerate(sorted(by_model)):
        sides[number % 2].extend(by_model[name])
    return sides


def keep_calibration(calibration: Calibration, folder: Path | None = None) -> Path:
    """Write it to the user's cache."""
    path = _file(calibration.device, calibration.versions, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, calibration.model_dump_json(indent=1) + "\n")
    return path


def kept_calibration(device: str, versions: str, folder: Path | None = None) -> Calibration | None:
    """What was measured of this device with these versions; None where nothing was, or the file is damaged."""
    try:
        found = Calibration.model_validate_json(_file(device, versions, folder).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    return found if (found.device, found.versions) == (device, versions) else None


def installed_versions() -> str:
    """What the memory beside the tensors depends on."""
    return json.dumps({"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()})


def _error(calibration: Calibration, row: MemoryRow) -> float:
    if row.process_bytes is None or calibration.context_bytes is None:
        found = row.reserved_bytes
        pred = calibration.process_pred_bytes(row.predicted_bytes) - (calibration.context_bytes or 0)
    else:
        found, pred = row.process_bytes, calibration.process_pred_bytes(row.predicted_bytes)
    return pred / found - 1


def _file(device: str, versions: str, folder: Path | None) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} {versions}").strip("-")
    return (folder or Path(platformdirs.user_cache_dir("lowmem"))) / "calibration" / f"{name}.json"
