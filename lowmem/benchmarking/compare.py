"""Benches of several computers side by side, and devices that nobody has run filled in by the planner.

All predictions of a comparison come from one version of the planner, by the table of known devices: those that calibrate as well
as those that are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarking.calibration import Calibration, calibrate
from lowmem.benchmarking.cases import CARD_BUDGETS
from lowmem.benchmarking.result import SYNTHETIC, BenchFile, load_bench
from lowmem.errors import LowmemError
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec, device_by_name, known_devices, settle_amp
from lowmem.planning.frontier import FrontierRow, frontier
from lowmem.recipe import Recipe, field_names

IGNORED_FIELDS = ("seed", "model.weights", "model.weights_optional", "model.head_init", "schedule", "data.val_px", "data.test_px", "data.val_fraction", "data.crop_frac")  # fmt: skip
"""What a step's time does not depend on."""


@dataclass(frozen=True)
class Entry:
    """One device in one budget. `low_s` and `high_s` bound the middle half of measured step times; None for predictions."""

    device: str
    kind: str
    budget_bytes: int
    step_s: float
    peak_bytes: int
    measured: bool
    low_s: float | None = None
    high_s: float | None = None
    n: int = 0
    source: str = ""
    """The file, or how it was predicted."""


@dataclass(frozen=True)
class Comparison:
    recipe: Recipe
    num_images: int
    num_classes: int
    entries: tuple[Entry, ...]
    missing: tuple[tuple[str, int, str], ...]
    """(device, budget, reason) of what does not fit or failed where it was measured."""
    calibrations: dict[str, Calibration]
    benches: tuple[tuple[str, BenchFile], ...]

    def epoch_s(self, entry: Entry) -> float:
        return entry.step_s * max(1, self.num_images // self.recipe.batch.size)

    @property
    def devices(self) -> list[str]:
        """Measured devices first, then predicted ones, each group from quick to slow."""
        best = {}
        for entry in self.entries:
            best[entry.device] = min(best.get(entry.device, (True, 9e9)), (not entry.measured, entry.step_s))
        return sorted(best, key=best.__getitem__)


def compare(paths: Sequence[Path], num_images: int | None = None, others: Sequence[str] | None = None) -> Comparison:
    """The comparison of bench files; raises LowmemError where they are not of the same work.

    `others`: names of devices to predict; None means every known card that was not measured.
    """
    benches = [(path.name, load_bench(path)) for path in paths]
    _refuse_different_work(benches)
    first = benches[0][1]
    entries, missing = _measured(benches)
    if not entries:
        raise LowmemError("None of these files has a measured budget, so there is nothing to compare.")
    rooflines = {
        name: _roofline(first, spec, _budgets(entries, name)) for name, spec in _measured_specs(entries).items()
    }
    calibrations = {kind: calibrate(_ratios(entries, rooflines, kind)) for kind in ("cuda", "cpu")}
    predicted = [
        entry
        for spec in _others(entries, others)
        for entry in _predicted(first, spec, entries, calibrations[spec.kind])
    ]
    return Comparison(
        recipe=first.recipe,
        num_images=num_images or first.num_images,
        num_classes=first.num_classes,
        entries=(*entries, *predicted),
        missing=tuple(missing),
        calibrations=calibrations,
        benches=tuple(benches),
    )


def _refuse_different_work(benches: Sequence[tuple[str, BenchFile]]) -> None:
    (first_name, first), *others = benches
    for name, bench in others:
        if (bench.data == SYNTHETIC) != (first.data == SYNTHETIC):
            raise LowmemError(
                f"{first_name} and {name} are not of the same work: --data was {first.data} and {bench.data}, and only one of them waits "
                "for images. Compare benches with synthetic images, or benches with photographs."
            )
        for field in ["num_classes", *(field for field in field_names() if not field.startswith(IGNORED_FIELDS))]:
            ours, theirs = (_value(each, field) for each in (first, bench))
            if ours != theirs:
                raise LowmemError(
                    f"{first_name} and {name} are not of the same work: {field} is {ours!r} and {theirs!r}. Compare benches of one recipe."
                )


def _value(bench: BenchFile, field: str) -> object:
    found: object = bench if field == "num_classes" else bench.recipe
    for part in field.split("."):
        found = getattr(found, part)
    return found


def _measured(benches: Sequence[tuple[str, BenchFile]]) -> tuple[list[Entry], list[tuple[str, int, str]]]:
    entries: list[Entry] = []
    missing: list[tuple[str, int, str]] = []
    taken: set[str] = set()
    for name, bench in benches:
        labels: dict[str, str] = {}
        for row in bench.rows:
            if row.device not in labels:
                labels[row.device] = _label(row.device_name, taken)
                taken.add(labels[row.device])
        for row in bench.rows:
            label = labels[row.device]
            if row.outcome == "measured":
                time = row.step_s
                kind = "cpu" if row.device == "cpu" else "cuda"
                entries.append(
                    Entry(
                        label,
                        kind,
                        row.budget_bytes,
                        time.median,
                        row.memory.peak_bytes,
                        True,
                        time.low,
                        time.high,
                        time.n,
                        name,
                    )
                )
            else:
                missing.append((label, row.budget_bytes, row.reason or "not measured yet"))
    return entries, missing


def _label(name: str, taken: set[str]) -> str:
    """A name of its own for each computer's device."""
    number, label = 1, name
    while label in taken:
        number += 1
        label = f"{name} ({number})"
    return label


def _measured_specs(entries: Sequence[Entry]) -> dict[str, DeviceSpec]:
    """Measured devices that the table knows."""
    specs = {}
    for entry in entries:
        try:
            specs[entry.device] = device_by_name("cpu" if entry.kind == "cpu" else entry.device)
        except LowmemError:
            continue
    return specs


def _budgets(entries: Sequence[Entry], device: str) -> list[int]:
    return sorted({entry.budget_bytes for entry in entries if entry.device == device})


def _roofline(bench: BenchFile, spec: DeviceSpec, budgets: Sequence[int]) -> dict[int, FrontierRow]:
    """Predicted rows by budget, of those that fit on the device."""
    within = [budget for budget in budgets if _is_possible(spec, budget)]
    if not within:
        return {}
    recipe = bench.recipe.model_copy(update={"amp": settle_amp(bench.recipe.amp, spec)})
    rows = frontier(recipe, spec, spec.kind, within, num_classes=bench.num_classes, num_train=bench.num_images)
    return {row.budget_bytes: row for row in rows if row.step_s is not None}


def _is_possible(spec: DeviceSpec, budget_bytes: int) -> bool:
    """Whether a device has this much, and any of it is left for tensors."""
    try:
        return budget_for(spec, budget_bytes, spec.kind).tensor_bytes > 0
    except LowmemError:
        return False


def _ratios(
    entries: Sequence[Entry], rooflines: dict[str, dict[int, FrontierRow]], kind: str
) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {}
    for entry in entries:
        row = rooflines.get(entry.device, {}).get(entry.budget_bytes)
        if entry.kind == kind and row is not None and row.step_s:
            ratios.setdefault(entry.device, []).append(entry.step_s / row.step_s)
    return ratios


def _others(entries: Sequence[Entry], names: Sequence[str] | None) -> list[DeviceSpec]:
    if names is not None:
        return [_named(name) for name in names]
    measured = {spec.name for spec in _measured_specs(entries).values()}
    return [spec for spec in known_devices() if spec.kind == "cuda" and spec.name not in measured]


def _named(name: str) -> DeviceSpec:
    try:
        return device_by_name(name)
    except LowmemError as error:
        raise LowmemError(str(error).replace("--device", "--predict", 1)) from None


def _predicted(bench: BenchFile, spec: DeviceSpec, entries: Sequence[Entry], calibration: Calibration) -> list[Entry]:
    """The device in the usual budgets of cards, those that were measured on cards, and all that it has."""
    measured = {entry.budget_bytes for entry in entries if entry.kind == spec.kind}
    usual = {*CARD_BUDGETS, spec.memory_bytes} if spec.kind == "cuda" else set()
    rows = _roofline(bench, spec, sorted(measured | usual)).values()
    how = "calibrated roofline" if calibration.devices else "roofline"
    return [
        Entry(
            spec.name,
            spec.kind,
            row.budget_bytes,
            calibration.factor * (row.step_s or 0),
            row.peak_bytes,
            False,
            source=how,
        )
        for row in rows
    ]
