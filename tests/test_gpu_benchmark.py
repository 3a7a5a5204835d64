"""benchmarks/gpu.py runs here at tiny size, so that on a card only the card is new; without one it says so."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu.Session(torch.device("cpu"), True, tmp_path / "out.json", time.monotonic() + 600, keep=False)


def test_plans_are_measured_in_turn_with_the_unconstrained_run(session: Any) -> None:
    import gpu

    gpu.run_rows(session)
    rows = session.report["rows"]
    assert [row["held_down"] for row in rows] == [False, False, True, True] and not any(row["error"] for row in rows)
    rich, lean = rows[0], rows[1]
    assert (rich["policies"], rich["optimizer"]) == ("none", "device") != (lean["policies"], lean["optimizer"])
    assert all(row["allocated_bytes"] <= row["budget_bytes"] for row in rows)
    assert all(abs(row["allocated_bytes"] / row["predicted_bytes"] - 1) < 0.01 for row in rows)
    assert all(len(row["event_s"]) == len(row["reference_s"]) == session.size.rounds for row in rows[:2])
    assert rich["kernel_s"] and rows[2]["allocated_bytes"] == rich["allocated_bytes"]
    assert any("of the prediction" in line for line in gpu.summary(session.report | {"execution": [], "timm": [], "sameness": []}))


def test_timms_loop_stands_beside_it(session: Any) -> None:
    import gpu

    gpu.run_timm(session)
    assert [row["grad_checkpointing"] for row in session.report["timm"]] == [False, True]
    assert all(row["step_s"] > 0 for row in session.report["timm"])


def test_what_fails_fails_the_benchmark(session: Any) -> None:
    import gpu

    good = {"error": "", "held_down": False}
    report: dict[str, Any] = {"rows": [good], "execution": [], "timm": [], "sameness": [{"model": "m", "holds": True}]}
    assert not gpu._errors(report)
    assert not gpu._errors(report | {"rows": [good | {"error": "LowmemError: --vram 2G is too small for it"}]})
    assert gpu._errors(report | {"rows": [good | {"error": "OutOfMemoryError: it spilled"}]})
    assert gpu._errors(report | {"sameness": [{"model": "m", "holds": False}]})
    assert gpu._errors(report | {"tests": {"exit_code": 1}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "No CUDA card" in done.stdout and not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_all_parts_at_tiny_size(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["smoke"] and report["photographs"]["epochs"] == 2 and all(row["holds"] for row in report["sameness"])
