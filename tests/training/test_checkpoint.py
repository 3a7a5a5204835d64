"""Checkpoints are read back as they were written, or refused by name."""

import json

import pytest
import safetensors.torch
import torch

from lowmem.errors import LowmemError
from lowmem.recipe import ModelRecipe, Recipe
from lowmem.training.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from lowmem.training.schedule import ScheduleState
from lowmem.training.state import RunState
from lowmem.training.tensorfile import DTYPES, tensor_chunks

RECIPE = Recipe(model=ModelRecipe(name="test_resnet"))


def checkpoint(epoch=1, step=2):
    torch.manual_seed(epoch)
    state = RunState(
        recipe=RECIPE,
        epoch=epoch,
        step=step,
        losses=(0.1, 1 / 3)[:step],
        schedule=ScheduleState(lr=1 / 3),
        scaler=None,
        seed=0,
        dataset="x",
    )
    return Checkpoint(state, {"a": torch.randn(3, 4), "n": torch.tensor(5)}, {"exp_avg/a": torch.randn(3, 4)})


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    written = checkpoint()
    read = read_checkpoint(Checkpoints(tmp_path / "c").write(written))
    assert read.state == written.state
    for before, after in ((written.model, read.model), (written.optimizer, read.optimizer)):
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_our_safetensors_bytes_are_those_that_the_library_reads(tmp_path):
    values = torch.tensor([[0, 1, 3], [1, 0, 2]])
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES} | {"none": torch.zeros(0, 3), "one": torch.tensor(1.5)}
    (tmp_path / "t").write_bytes(b"".join(tensor_chunks(tensors)))
    read = safetensors.torch.load_file(tmp_path / "t")
    assert read.keys() == tensors.keys()
    assert all(
        read[n].dtype == t.dtype and read[n].shape == t.shape and torch.equal(read[n], t) for n, t in tensors.items()
    )


def test_the_newest_two_are_kept_and_nothing_else_is_left(tmp_path):
    kept = Checkpoints(tmp_path)
    for epoch in (1, 2, 3):
        kept.write(checkpoint(epoch))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002-epoch2-step2", "000003-epoch3-step2"]
    assert Checkpoints(tmp_path).newest()[1].state.epoch == 3


def test_numbers_order_checkpoints_not_epochs_and_strangers_are_left_alone(tmp_path):
    kept = Checkpoints(tmp_path)
    for epoch, step in ((9, 0), (1, 0), (1, 0)):
        kept.write(checkpoint(epoch, step))
    (tmp_path / "zzz").mkdir()
    (tmp_path / "999999-epoch1-step").mkdir()
    assert Checkpoints(tmp_path).newest()[0].name == "000003-epoch1-step0"
    Checkpoints(tmp_path).write(checkpoint(2))
    assert {"zzz", "999999-epoch1-step"} < {path.name for path in tmp_path.iterdir()}


def test_damaged_checkpoints_never_push_out_the_good_one(tmp_path):
    """The older good one is kept until a newer one is whole, though the damaged ones have higher numbers."""
    for epoch in (1, 2):
        damaged = Checkpoints(tmp_path).write(checkpoint(epoch))
    good = sorted(tmp_path.iterdir())[0]
    (damaged / "state.json").unlink()
    kept = Checkpoints(tmp_path)
    assert kept.newest()[0] == good
    new = kept.write(checkpoint(1, 1))
    assert sorted(tmp_path.iterdir()) == [good, new] and new.name == "000003-epoch1-step1"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_every_flipped_byte_is_found_and_the_older_checkpoint_takes_over(tmp_path, name):
    Checkpoints(tmp_path).write(checkpoint(1))
    kept = Checkpoints(tmp_path)
    kept.newest()
    file = kept.write(checkpoint(2)) / name
    good = file.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 25)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        file.write_bytes(bytes(damaged))
        path, found, problems = Checkpoints(tmp_path).newest()
        assert (path.name, found.state.epoch) == ("000001-epoch1-step2", 1) and "000002" in problems[0]
    file.write_bytes(good)
    assert Checkpoints(tmp_path).newest()[1].state.epoch == 2


def test_a_truncated_missing_or_foreign_file_is_named(tmp_path):
    path = Checkpoints(tmp_path).write(checkpoint())
    model = path / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-7])
    with pytest.raises(LowmemError, match="model.safetensors: damaged"):
        read_checkpoint(path)
    model.unlink()
    with pytest.raises(LowmemError, match="model.safetensors"):
        read_checkpoint(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../etc/passwd"] = manifest["files"].pop("model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LowmemError, match="other files"):
        read_checkpoint(path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(LowmemError, match="no checkpoint"):
        Checkpoints(tmp_path / "missing").newest()
