"""F13: Ctrl-C and SIGTERM, once, twice and inside a save: a checkpoint, a message, exit code 130, and an exact continuation."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem.training.interrupt import stopping_at_once
from tests.faults.child import Fault
from tests.faults.harness import (
    Child,
    differing,
    end_state,
    make_photos,
    make_plan_file,
    resume_arguments,
    run,
    start,
    train_arguments,
    wait_for,
)

EXIT_STOPPED = 130
EPOCHS = "schedule.epochs=12"
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes but Ctrl-Break")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """Images, a plan, and the end of a run that nobody disturbs."""
    root = tmp_path_factory.mktemp("signals")
    photos, plan = make_photos(root / "photos"), make_plan_file(root / "plan.json")
    assert run(train_arguments(photos, plan, root / "whole", EPOCHS), root / "whole.txt") == 0
    return photos, plan, end_state(root / "whole")


def num_events(out: Path, event: str) -> int:
    file = out / "events.jsonl"
    if not file.is_file():
        return 0
    return sum(f'"event": "{event}"' in line for line in file.read_text(encoding="utf-8").splitlines())


def running(inputs: Any, tmp_path: Path, every: str = "10m", fault: Fault | None = None) -> Child:
    return start(
        train_arguments(inputs[0], inputs[1], tmp_path / "run", EPOCHS, every=every), tmp_path / "out.txt", fault
    )


def goes_on_exactly(inputs: Any, tmp_path: Path) -> None:
    assert run(resume_arguments(tmp_path / "run"), tmp_path / "resumed.txt") == 0
    assert differing(inputs[2], end_state(tmp_path / "run")) == []


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_stops_after_the_step_with_a_checkpoint(inputs: Any, tmp_path: Path, number: int) -> None:
    child, out = running(inputs, tmp_path), tmp_path / "run"
    wait_for(lambda: num_events(out, "epoch") >= 1)
    child.send(number)
    assert child.wait() == EXIT_STOPPED
    assert "Stopping" in child.text() and f"lowmem resume {out}" in child.text() and "Traceback" not in child.text()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    saved = [e for e in events if e["event"] == "checkpoint"][-1]["path"]
    assert f"Stopped after step {saved.rpartition('step')[2]} of epoch" in child.text()
    assert not (out / "run.lock").exists() and num_events(out, "finished") == 0
    goes_on_exactly(inputs, tmp_path)


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.fault)])
def test_two_signals_stop_at_once_and_the_last_checkpoint_is_whole(inputs: Any, tmp_path: Path, number: int) -> None:
    child = running(inputs, tmp_path, every="1-steps")
    wait_for(lambda: num_events(tmp_path / "run", "epoch") >= 1)
    child.send(number)
    wait_for(lambda: "Stopping" in child.text() or child.process.exitcode is not None)
    child.send(number)
    assert child.wait() == EXIT_STOPPED
    assert "Traceback" not in child.text()
    goes_on_exactly(inputs, tmp_path)


@posix
@pytest.mark.parametrize("at_call", [16, 40, 71])
def test_a_signal_inside_a_save(inputs: Any, tmp_path: Path, at_call: int) -> None:
    child = running(inputs, tmp_path, every="1-steps", fault=Fault(at_call, signal.SIGINT))
    assert child.wait() == EXIT_STOPPED
    assert "lowmem resume" in child.text() and "Traceback" not in child.text()
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names and not [name for name in names if name.endswith(".partial")]
    goes_on_exactly(inputs, tmp_path)


@pytest.mark.skipif(os.name != "nt", reason="Ctrl-Break is of Windows")
def test_ctrl_break_stops_after_the_step(inputs: Any, tmp_path: Path) -> None:
    code = "from lowmem.cli import main; main()"
    arguments = train_arguments(inputs[0], inputs[1], tmp_path / "run", "schedule.epochs=2000")
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], creationflags=subprocess.CREATE_NEW_PROCESS_GROUP
    )
    wait_for(lambda: num_events(tmp_path / "run", "epoch") >= 1)
    child.send_signal(signal.CTRL_BREAK_EVENT)
    assert child.wait(60) == EXIT_STOPPED


@posix
def test_a_signal_in_an_import_is_not_lost(tmp_path: Path) -> None:
    """Modules that swallow a KeyboardInterrupt made runs go on, and numpy recursed to death after one."""
    (tmp_path / "swallowing.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    for opening, expected in (("stopping_at_once()", EXIT_STOPPED), ("nullcontext()", 0)):
        code = (
            "from contextlib import nullcontext\nfrom lowmem.training.interrupt import stopping_at_once\n"
            f"with {opening}:\n    import swallowing"
        )
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
        assert done.returncode == expected
        assert (b"Stopped." in done.stderr) == bool(expected)


def test_a_signal_outside_of_a_run_is_a_keyboard_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopping_at_once():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
