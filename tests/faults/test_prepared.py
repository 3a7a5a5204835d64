"""Runs on images shrunk once: resumed without the cache, evaluated as they were validated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from lowmem.assessment import EvaluateRequest, evaluate_folder
from lowmem.data.prepared import open_cache
from lowmem.results.classifier import CONFIG, MAX_SIDE
from tests.faults.harness import differing
from tests.faults.stops import EXIT_STOPPED, tiny

SHRUNK = "data.max_side=36"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "user"))


def test_a_run_resumes_bitwise_without_its_cache(photos: Path, tmp_path: Path) -> None:
    whole = tiny(photos, tmp_path, "whole", 2, 1, SHRUNK)
    assert whole.train() == 0
    stopped = tiny(photos, tmp_path, "run", 4, 1, SHRUNK)
    assert stopped.train(stop_in=(2, 1)) == EXIT_STOPPED
    shutil.rmtree(open_cache().folder)
    assert stopped.resume() == 0
    assert differing(whole.end(), stopped.end()) == []
    otherwise = tiny(photos, tmp_path, "otherwise", 2, 1, "data.max_side=37")
    assert otherwise.train() == 0
    assert differing(whole.end(), otherwise.end()) != []


def test_the_classifier_is_evaluated_as_it_was_validated(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path, "run", 0, 1, SHRUNK, "schedule.epochs=1")
    assert run.train() == 0
    assert json.loads((run.out / "classifier" / CONFIG).read_text())[MAX_SIDE] == 36
    val = tmp_path / "val"
    for line in (run.out / "images.tsv").read_text().splitlines():
        which, label, _, name = line.split("\t")
        if which == "val":
            (val / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / name, val / label / Path(name).name)
    expected = json.loads((run.out / "evaluation.json").read_text())["loss"]
    torch.set_num_threads(1)
    found = evaluate_folder(EvaluateRequest(run.out, val, device="cpu"), Console(quiet=True))[0].loss
    assert found == pytest.approx(expected, rel=1e-5)
    config = run.out / "classifier" / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), MAX_SIDE: 0}))
    unshrunk = evaluate_folder(EvaluateRequest(run.out, val, device="cpu"), Console(quiet=True))[0].loss
    assert unshrunk != pytest.approx(expected, rel=1e-5)
