"""The fit of what a card adds, on rows made by a rule that is known, and its way into a budget."""

from pathlib import Path

import numpy as np
import pytest

from lowmem.errors import LowmemError
from lowmem.planning import budget
from lowmem.planning.calibration import (
    Calibration,
    MemoryRow,
    check,
    fit,
    halves,
    installed_versions,
    keep_calibration,
    kept_calibration,
    memory_rows,
)
from lowmem.planning.devices import device_by_name
from lowmem.sizes import GIB, MIB

CONTEXT, WORKSPACE, SHARE = 512 * MIB, 80 * MIB, 0.03


def rows(num_models: int = 8, noise: float = 0.0, seed: int = 0) -> list[MemoryRow]:
    """Reserved = workspace + (1 + share) x predicted, less a part of the allowance at random."""
    random, made = np.random.default_rng(seed), []
    for model in range(num_models):
        for _ in range(6):
            predicted = int(random.uniform(1, 12) * GIB)
            extra = (WORKSPACE + SHARE * predicted) * (1 - noise * random.random())
            reserved = predicted + int(extra)
            made.append(MemoryRow(f"model{model}", predicted, reserved, reserved + CONTEXT))
    return made


def test_the_rule_is_found_again() -> None:
    found = fit(rows(), "card", "v")
    assert found.context_bytes == CONTEXT and found.num_rows == 48
    assert found.workspace_bytes == pytest.approx(WORKSPACE, rel=1e-3) and found.rounding_frac == pytest.approx(
        SHARE, rel=1e-3
    )


def test_it_holds_on_models_that_it_was_not_fitted_to() -> None:
    fitted, held_out = halves(rows(noise=0.3))
    assert not {row.model for row in fitted} & {row.model for row in held_out} and len(held_out) == 24
    found = check(fit(fitted, "card", "v"), held_out)
    assert found.num_rows == 24 and found.median_error <= 0.02 and found.p95_error <= 0.05 and found.under_frac <= 0.1


def test_a_wrong_calibration_is_noticed() -> None:
    """The negative control: without the workspace and the share, every row is under-estimated."""
    wrong = fit(rows(), "card", "v").model_copy(update={"workspace_bytes": 0, "rounding_frac": 0.0})
    assert check(wrong, rows()).under_frac == 1.0


def test_every_row_that_it_was_fitted_to_fits() -> None:
    made = rows(noise=0.5, seed=3)
    assert check(fit(made, "card", "v"), made).under_frac == 0.0


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(LowmemError, match="3 measured rows are too few to calibrate card"):
        fit(rows()[:3], "card", "v")


def test_rows_without_a_process_are_compared_by_what_was_reserved() -> None:
    made = [MemoryRow(row.model, row.predicted_bytes, row.reserved_bytes) for row in rows()]
    found = fit(made, "card", "v")
    assert found.context_bytes is None and check(found, made).median_error < 1e-3


def test_rows_of_small_cards_count_where_there_are_any() -> None:
    usual = {"model": "m", "px": 224, "predicted_bytes": 10, "reserved_bytes": 12, "process_bytes": 14, "error": ""}
    report = {"rows": [usual | {"held_down": False}, usual | {"held_down": True, "reserved_bytes": 11}]}
    assert memory_rows(report) == [MemoryRow("m 224 px", 10, 11, 14)]
    assert memory_rows({"rows": report["rows"][:1]}) == [MemoryRow("m 224 px", 10, 12, 14)]
    assert memory_rows({"rows": [usual | {"held_down": True, "error": "it failed"}]}) == []


def test_it_is_kept_by_device_and_versions_and_damage_is_nothing(tmp_path: Path) -> None:
    made = fit(rows(), "GeForce RTX 4060", "torch 2")
    path = keep_calibration(made, tmp_path)
    assert kept_calibration("GeForce RTX 4060", "torch 2", tmp_path) == made
    assert kept_calibration("GeForce RTX 4060", "torch 3", tmp_path) is None
    path.write_text(path.read_text().replace('"rounding_frac": 0.0', '"rounding_frac": 9.0'))
    assert kept_calibration("GeForce RTX 4060", "torch 2", tmp_path) is None


def test_a_budget_uses_it_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path))
    spec = device_by_name("RTX 4060").model_copy(update={"present": True})
    estimated = budget.budget_for(spec, 4 * GIB, "cuda:0")
    assert all("estimated" in line.what for line in estimated.deductions)
    kept = Calibration(
        device=spec.name, versions=installed_versions(), num_rows=18, context_bytes=300 * MIB, workspace_bytes=50 * MIB, rounding_frac=0.01
    )  # fmt: skip
    keep_calibration(kept)
    measured = budget.budget_for(spec, 4 * GIB, "cuda:0")
    assert {line.what: line.num_bytes for line in measured.deductions} == {
        "CUDA context, cuDNN and cuBLAS (measured here)": 300 * MIB,
        "convolution workspace (fitted to 18 runs here)": 50 * MIB,
        "allocator rounding (fitted to 18 runs here)": int(0.01 * 4 * GIB),
    }
    assert measured.tensor_bytes > estimated.tensor_bytes
    elsewhere = spec.model_copy(update={"present": False})
    assert all("estimated" in line.what for line in budget.budget_for(elsewhere, 4 * GIB, "cuda:0").deductions)
