"""F3 and F4: run folders that are full, read-only, missing, too small, or in use."""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowmem.disk import Disk
from lowmem.errors import LowmemError
from lowmem.memory.pressure import num_oom_kills
from lowmem.training.checkpoint import Checkpoints
from lowmem.training.folder import RunFolder, new_run_folder
from lowmem.training.lock import RunLock
from tests.faults.child import KILL
from tests.faults.harness import (
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
from tests.faults.model_disk import Crash
from tests.faults.stops import TinyRun


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return make_photos(root / "photos"), make_plan_file(root / "plan.json")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file size limits are of POSIX")
@pytest.mark.parametrize("limit_bytes", [1_000, 1_000_000])
def test_a_full_disk_is_told_and_the_run_goes_on_later(inputs: Any, tmp_path: Path, limit_bytes: int) -> None:
    """No file may grow past the limit, as on a full disk: one of the run's facts or of a checkpoint's files fails."""
    out, text = tmp_path / "run", tmp_path / "out.txt"
    code = run(train_arguments(*inputs, out), text, max_file_bytes=limit_bytes)
    told = text.read_text()
    assert (
        code == 2
        and "could not be written" in told
        and "are free" in told
        and str(out) in told
        and "Traceback" not in told
    )
    again = resume_arguments(out) if (out / "recipe.toml").is_file() else train_arguments(*inputs, out)
    assert run(again, tmp_path / "again.txt") == 0
    assert run(train_arguments(*inputs, tmp_path / "whole"), text) == 0
    assert differing(end_state(tmp_path / "whole"), end_state(out)) == []


def test_the_disk_fills_in_the_middle_of_a_run(inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir, calls = Disk.mkdir, []

    def full(self: Disk, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(self, path)

    out = TinyRun(*inputs, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "mkdir", full)
        with pytest.raises(LowmemError, match=r"No space left on device. It needs .* bytes\); .* are free"):
            out.train()
    assert len(Checkpoints(out.out / "checkpoints").all()) == 2
    assert out.resume() == 0
    whole = TinyRun(*inputs, tmp_path / "whole")
    assert whole.train() == 0
    assert differing(whole.end(), out.end()) == []


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    inputs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "free_bytes", lambda self, path: 1_000_000)
    out = TinyRun(*inputs, tmp_path / "run")
    with pytest.raises(LowmemError, match=r"too small: .* need .* bytes\); .*\(1000000 bytes\) are free.*--out"):
        out.train()
    assert not list(out.out.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LowmemError, match="--out"):
        new_run_folder(tmp_path / "file" / "run", "x")
    with pytest.raises(LowmemError, match="--out"):
        new_run_folder(tmp_path / "file", "x")
    if os.name == "nt" or os.geteuid() == 0:
        return
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(LowmemError, match="cannot be written"):
        new_run_folder(tmp_path / "locked" / "run", "x")
    with pytest.raises(LowmemError, match="cannot be written"):
        new_run_folder(tmp_path / "locked", "x")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that not even root can write is Linux's /proc")
def test_a_read_only_folder_is_refused_even_for_root() -> None:
    with pytest.raises(LowmemError, match="cannot be written"):
        new_run_folder(Path("/proc/lowmem-run"), "x")
    with pytest.raises(LowmemError, match="cannot be locked"), RunLock(RunFolder(Path("/proc"))):
        pass


def test_a_folder_in_use_is_refused_until_its_run_is_gone(inputs: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start(train_arguments(*inputs, out, "schedule.epochs=2000"), tmp_path / "out.txt")
    try:
        wait_for(lambda: (out / "checkpoints").is_dir() and list((out / "checkpoints").glob("0*")))
        code = run(resume_arguments(out), tmp_path / "second.txt")
        told = (tmp_path / "second.txt").read_text()
        assert code == 2 and f"in use by another run (process {child.process.pid})" in told
    finally:
        child.kill()
    assert child.wait() in (-KILL, 1)
    assert (out / "run.lock").is_file(), "a killed run leaves the file, but not the lock"
    with RunLock(RunFolder(out)):
        pass
    assert not (out / "run.lock").exists()


def test_a_lock_file_alone_locks_nothing(tmp_path: Path) -> None:
    """Not even one that names a process that is alive."""
    (tmp_path / "run.lock").write_text(f'{{"pid": {os.getpid()}}}')
    with RunLock(RunFolder(tmp_path)), pytest.raises(LowmemError, match="in use"), RunLock(RunFolder(tmp_path)):
        pass
    with RunLock(RunFolder(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"oom_kills": 0}, "the system's memory killer has struck"),
        ({"oom_kills": 5}, "was killed or has crashed"),
        ({"oom_kills": 0, "started": 1.0}, "which was started anew"),
        ({"oom_kills": "x"}, "was killed or has crashed"),
    ],
)
def test_how_a_run_died_is_told_to_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], told: str
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 7\noom_kill 5\n")
    monkeypatch.setattr("lowmem.training.lock.num_oom_kills", lambda: num_oom_kills(vmstat))
    (tmp_path / "run.lock").write_text(json.dumps({"pid": 1, "started": psutil.boot_time()} | facts))
    with RunLock(RunFolder(tmp_path)) as lock:
        assert told in lock.last_end
    with RunLock(RunFolder(tmp_path)) as lock:
        assert lock.last_end == "", "a holder that is done says nothing"


def test_a_system_that_counts_no_kills_tells_none(tmp_path: Path) -> None:
    assert num_oom_kills(tmp_path / "none") == 0
    (tmp_path / "vmstat").write_text("oom_kill many\n")
    assert num_oom_kills(tmp_path / "vmstat") == 0


def test_a_run_that_died_before_its_recipe_was_written_starts_again(inputs: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("plan.json", "run.lock", ".machine.json.partial"):
        (out / name).write_text("{")
    with pytest.raises(LowmemError, match="not a run folder"):
        TinyRun(*inputs, out).resume()
    assert TinyRun(*inputs, out).train() == 0
    with pytest.raises(LowmemError, match="lowmem resume"):
        TinyRun(*inputs, out).train()


def test_a_kill_while_the_folder_is_tried_out_does_not_block_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the thousand kills: one died between the write and the removal of the file that tries the folder."""
    out = tmp_path / "run"

    def die(self: Path, missing_ok: bool = False) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(Crash):
            new_run_folder(out, "x")
    assert list(out.iterdir())
    assert new_run_folder(out, "x").path == out
