import json

import pytest
import torch

from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoint, RunState, newest_checkpoint, read_checkpoint, write_checkpoint
from lowmem.training.schedule import ScheduleState


def checkpoint(epoch=1, step=0):
    torch.manual_seed(epoch)
    state = RunState(
        epoch=epoch, step=step, losses=(0.1, 1 / 3), schedule=ScheduleState(lr=1 / 3), scaler=None, seed=0, dataset="x"
    )
    return Checkpoint(state, {"a": torch.randn(3, 4), "n": torch.tensor(5)}, {"exp_avg/a": torch.randn(3, 4)})


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    written = checkpoint()
    read = read_checkpoint(write_checkpoint(tmp_path, written))
    assert read.state == written.state
    for before, after in ((written.model, read.model), (written.optimizer, read.optimizer)):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_the_newest_two_are_kept_and_nothing_else_is_left(tmp_path):
    for epoch in (1, 2, 3):
        write_checkpoint(tmp_path, checkpoint(epoch))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00002-0000000", "00003-0000000"]
    assert newest_checkpoint(tmp_path)[1].state.epoch == 3


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_flipped_byte_is_found_and_the_older_checkpoint_takes_over(tmp_path, name):
    write_checkpoint(tmp_path, checkpoint(1))
    file = write_checkpoint(tmp_path, checkpoint(2)) / name
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 25)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        file.write_bytes(bytes(damaged))
        path, found, problems = newest_checkpoint(tmp_path)
        assert (path.name, found.state.epoch) == ("00001-0000000", 1) and "00002" in problems[0]
    file.write_bytes(good)
    assert newest_checkpoint(tmp_path)[1].state.epoch == 2


def test_a_truncated_missing_or_foreign_file_is_named(tmp_path):
    path = write_checkpoint(tmp_path, checkpoint())
    model = path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-7])
    with pytest.raises(LowmemError, match="model.safetensors: damaged"):
        read_checkpoint(path)
    model.unlink()
    with pytest.raises(LowmemError, match="model.safetensors"):
        read_checkpoint(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["../../etc/passwd"] = manifest.pop("model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LowmemError, match="other files"):
        read_checkpoint(path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(LowmemError, match="no checkpoint"):
        newest_checkpoint(tmp_path / "missing")
