"""tools/summarize.py and tools/ablate.py on real, tiny runs."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lowmem.errors import LowmemError
from tests.faults.harness import make_photos
from tests.faults.stops import tiny

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import ablate  # noqa: E402
import summarize  # noqa: E402
from paired import Arm, compared, draw, in_words  # noqa: E402

TINY = """
question = "Is a low rate worse?"
base = "quickstart"
set = ["model.name=test_resnet", "model.weights=none", "model.freeze_batchnorm=false", "data.train_px=32", "data.val_px=32",
       "data.test_px=32", "batch.size=8", "schedule.epochs=3", "amp=fp32"]
field = "optimizer.lr"
values = [1e-3, 1e-7]
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question with two arms and two seeds that was stopped on the way and asked again."""
    folder = tmp_path_factory.mktemp("question")
    make_photos(folder / "photos")
    (folder / "rate.toml").write_text(TINY)
    first = start(folder)
    deadline = time.monotonic() + 100
    while not (folder / "runs" / "0.001-seed0" / "epochs.csv").is_file():
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM if os.name == "posix" else signal.SIGBREAK)
    assert first.wait(60) != 0
    second = start(folder)
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, out
    (folder / "told.txt").write_text(out)
    return folder


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "ablate.py"), "rate.toml", "--data", "photos", "--device", "cpu"]
    command += ["--vram", "1G", "--seeds", "2", "--out", "runs"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_question_goes_on_where_it_was_stopped(asked: Path) -> None:
    runs = sorted(path.name for path in (asked / "runs").iterdir() if path.is_dir())
    assert runs == ["0.001-seed0", "0.001-seed1", "1e-07-seed0", "1e-07-seed1"]
    events = [
        json.loads(line)["event"] for line in (asked / "runs" / runs[0] / "events.jsonl").read_text().splitlines()
    ]
    assert events.count("started") == 1 and "resumed" in events and events[-1] == "finished"
    report = json.loads((asked / "runs" / "rate.json").read_text())
    assert report["n"] == 2 and [arm["name"] for arm in report["arms"]] == ["0.001", "1e-07"]
    assert report["comparisons"][0]["n"] == 2 and (asked / "runs" / "rate.png").stat().st_size > 10_000
    assert "paired by seed" in (asked / "told.txt").read_text()


@pytest.mark.slow
def test_a_changed_question_is_not_mixed_with_old_runs(asked: Path) -> None:
    changed = ablate.Question(question="?", base="quickstart", field="optimizer.lr", values=(1e-3, 1e-2))
    trial = ablate.trials(changed, "quickstart", 1, asked / "runs")[0]
    with pytest.raises(LowmemError, match="another recipe"):
        ablate.refuse_another_recipe(trial, "quickstart")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("question = 1", "question"),
        ('question = "a"\nbase = "quickstart"\nfield = "seed"', "field and values"),
        ('question = "a"\nbase = "quickstart"\nfield = "seed"\nvalues = [1]', "at least two"),
        ("nonsense", "TOML"),
    ],
)
def test_a_bad_question_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(LowmemError, match=told):
        ablate.read_question(tmp_path / "q.toml")


def test_every_shipped_question_has_valid_recipes() -> None:
    names = [path for path in ablate.QUESTIONS.rglob("*.toml") if path.stem != "small"]
    assert len(names) == 6
    for path in names:
        question = ablate.read_question(path)
        found = ablate.trials(question, ablate.base_recipe(path, question.base), 2, Path("runs"))
        assert len({trial.folder for trial in found}) == len(found) >= 4
    with pytest.raises(LowmemError, match="demo/cardinality"):
        ablate.question_file("nothing")


def test_the_comparison_is_scipys_paired_test(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    a = random.normal(0.8, 0.05, 6)
    b = a + random.normal(0.03, 0.005, 6)
    item = compared([Arm("a", tuple(a)), Arm("b", tuple(b))])[0]
    assert item.p == pytest.approx(stats.ttest_1samp(b - a, 0).pvalue) and item.low > 0 and item.verdict() == "higher"
    unpaired = stats.ttest_ind(b, a).pvalue
    assert unpaired > 10 * item.p, "pairing by seed is what finds it"
    assert "n = 6" in in_words(item)
    one = compared([Arm("a", (0.5,)), Arm("b", (0.6,))])[0]
    assert one.low is None and "tells nothing" in in_words(one)
    assert compared([Arm("a", (0.5, 0.6)), Arm("b", (0.5, 0.6))])[0].verdict() == "no difference shown"
    draw("q", "accuracy", [Arm("a", (0.5,)), Arm("b", (0.6,))], tmp_path / "one.png")


def test_a_folder_of_runs_is_one_table(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    run = tiny(make_photos(tmp_path / "photos"), runs, "whole", 0, 1, "schedule.epochs=2", "optimizer.lr=1e-4")
    assert run.train() == 0
    for name in ("young", "garbled", "halved"):
        shutil.copytree(runs / "whole", runs / name)
    (runs / "young" / "epochs.csv").unlink()
    (runs / "young" / "events.jsonl").write_text('{"event": "started"}\n{"eve')
    (runs / "garbled" / "recipe.toml").write_text("garbage")
    (runs / "halved" / "evaluation.json").write_text("{")
    summary = summarize.summarize(runs, "score")
    assert [name for name, _ in summary.broken] == ["garbled", "halved"]
    whole, young = summary.rows
    assert (whole["run"], whole["model"], whole["batch"], whole["status"]) == ("whole", "test_resnet", "8", "finished")
    assert (
        whole["lr and decay"].startswith("0.0001 x")
        and whole["mixup"] == "0.5/1"
        and whole["loss"].startswith("CE, reciprocal")
    )
    assert whole["epochs"].endswith("/2 of 2") and 0 <= float(whole["score"]) <= 1 and float(whole["s/epoch"]) > 0
    assert (young["epochs"], young["score"], young["status"]) == ("-/0 of 2", "-", "unfinished")
    table = list(csv.DictReader(io.StringIO(summarize.as_csv(summary))))
    assert len(table) == 4 and table[0]["run"] == "whole" and table[-1]["status"].startswith("broken")
    lines = summarize.as_markdown(summary).splitlines()
    assert lines[0].count("|") == len(summarize.COLUMNS) + 1 == lines[2].count("|")
    assert "could not be read" in lines[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(LowmemError, match="no run"):
        summarize.summarize(tmp_path / "empty")
    with pytest.raises(LowmemError, match="no folder"):
        summarize.summarize(tmp_path / "nothing")
