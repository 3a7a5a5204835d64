"""F9: a NaN or an infinity never becomes the best classifier or a checkpoint, and the message gives the step."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoints
from tests.faults.harness import differing, make_photos, make_plan_file
from tests.faults.numbers import INJECTIONS, at_step, in_metric
from tests.faults.stops import TinyRun

STEP_AFTER_A_SAVE, LAST_STEP = (2, 1), (2, 3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("numbers")
    photos, plan = make_photos(root / "photos"), make_plan_file(root / "plan.json")
    whole = TinyRun(photos, plan, root / "whole")
    assert whole.train() == 0
    return photos, plan, whole.end()


def all_finite(tensors: dict[str, torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (STEP_AFTER_A_SAVE, math.nan),
        (LAST_STEP, math.inf),
        pytest.param(STEP_AFTER_A_SAVE, math.inf, marks=pytest.mark.fault),
        pytest.param(LAST_STEP, math.nan, marks=pytest.mark.fault),
    ],
)
@pytest.mark.parametrize("place", INJECTIONS)
def test_it_is_refused_and_the_run_can_be_resumed(
    inputs: Any, tmp_path: Path, place: str, value: float, at: tuple[int, int]
) -> None:
    if (place, at, value) in (("optimizer", STEP_AFTER_A_SAVE, math.inf), ("statistic", STEP_AFTER_A_SAVE, math.inf)):
        every = "1-steps"  # finite losses may follow: the next checkpoint notices
    else:
        every = "10m"
    run = TinyRun(*inputs[:2], tmp_path / "run")
    with at_step(INJECTIONS[place], value, *at), pytest.raises(LowmemError) as told:
        run.train(every=every)
    assert "no longer finite by step" in str(told.value) and "of epoch 2" in str(told.value)
    step = int(str(told.value).partition("by step ")[2].split()[0])
    assert at[1] < step <= 4
    _, kept, problems = Checkpoints(run.out / "checkpoints").newest()
    assert not problems and all_finite(kept.model) and all_finite(kept.optimizer)
    assert all_finite(safetensors.torch.load_file(run.out / "classifier" / "model.safetensors"))
    assert run.resume() == 0
    assert differing(inputs[2], run.end()) == []


@pytest.mark.parametrize(("value", "epoch"), [(math.nan, 1), (math.inf, 3), (-math.inf, 1)])
def test_a_metric_that_is_no_number_is_never_the_best(inputs: Any, tmp_path: Path, value: float, epoch: int) -> None:
    run = TinyRun(*inputs[:2], tmp_path / "run")
    with in_metric(value, epoch):
        assert run.train() == 0
    state = Checkpoints(run.out / "checkpoints").newest()[1].state
    assert state.schedule.best_epoch not in (0, epoch) and math.isfinite(state.schedule.best_accuracy_loss)
    with open(run.out / "epochs.csv", newline="") as rows:
        assert not math.isfinite(float(list(csv.DictReader(rows))[epoch - 1]["val_loss"]))
    assert (run.out / "report.html").is_file()
