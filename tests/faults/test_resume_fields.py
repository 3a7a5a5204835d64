"""Exact resume of a run with an average of the weights, a cosine, layer-wise rates, exempt weights and label smoothing."""

from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoint, Checkpoints
from tests.faults.harness import differing
from tests.faults.stops import EVERY_STEP, EXIT_STOPPED, tiny, whole

FIELDS = (
    "ema.decay=0.8",
    "ema.warmup=true",
    "schedule.kind=cosine",
    "schedule.min_lr=1e-5",
    "schedule.warmup_epochs=1",
    "optimizer.layer_decay=0.8",
    "optimizer.exclude_norm_and_bias=true",
    "loss.label_smoothing=0.1",
)


@pytest.mark.parametrize(("at", "atoms"), [((1, 1), 1), ((2, 0), 4), ((3, 2), 1)])
def test_a_stopped_run_ends_bitwise_the_same(photos: Path, tmp_path: Path, at: tuple[int, int], atoms: int) -> None:
    expected = whole(photos, tmp_path, atoms, *FIELDS)
    assert any(name.startswith("optimizer.safetensors/ema/") for name in expected)
    run, steps = tiny(photos, tmp_path, "run", 0, atoms, *FIELDS), []
    assert run.train(stop_in=at, seen=steps) == EXIT_STOPPED
    assert run.resume(seen=steps) == 0
    assert steps == EVERY_STEP and differing(expected, run.end()) == []


@pytest.mark.parametrize("forgotten", ["ema/", "ema.updates"])
def test_a_resume_that_forgets_the_average_is_noticed(
    photos: Path, tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(photos, tmp_path, 1, *FIELDS)
    run = tiny(photos, tmp_path, "run", 0, 1, *FIELDS)
    assert run.train(stop_in=(2, 1)) == EXIT_STOPPED
    newest = Checkpoints.newest

    def without(self: Checkpoints) -> Any:
        path, found, problems = newest(self)
        zeroed = {name: t * 0 if name.startswith(forgotten) else t for name, t in found.optimizer.items()}
        return path, Checkpoint(found.state, found.model, zeroed), problems

    monkeypatch.setattr(Checkpoints, "newest", without)
    assert run.resume() == 0
    assert differing(expected, run.end()) != []


def test_an_average_cannot_begin_in_the_middle(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(1, 1)) == EXIT_STOPPED
    with pytest.raises(LowmemError, match="ema.decay"):
        run.resume(None, "ema.decay=0.9")
