"""F2 and F3: a save is stopped at every call of the disk, by a kill, a power loss or an error: the old checkpoint or the new one."""

import errno
import random
import shutil
from pathlib import Path

import pytest
import torch

from lowmem.disk import replace_file
from lowmem.errors import LowmemError
from lowmem.training.checkpoint import Checkpoint, Checkpoints
from tests.faults.model_disk import Crash, ModelDisk, materialise, power_losses
from tests.training.test_checkpoint import checkpoint

NUM_RANDOM = 6


def run_folder(root: Path, num_checkpoints: int) -> Path:
    """A run folder with that many checkpoints."""
    kept = Checkpoints(root / "checkpoints")
    root.mkdir()
    for epoch in range(1, num_checkpoints + 1):
        kept.write(checkpoint(epoch))
    return root


def written_by(root: Path, disk: ModelDisk) -> None:
    """One more save on top of what is there."""
    kept = Checkpoints(root / "checkpoints", disk)
    if kept.all():
        kept.newest()
        kept.good = kept.all()
    kept.write(checkpoint(9))


def calls_of_a_save(template: Path, scratch: Path) -> list[str]:
    shutil.copytree(template, scratch)
    disk = ModelDisk(scratch)
    written_by(scratch, disk)
    return disk.calls


def epoch_found(root: Path, num_before: int) -> int:
    """Epoch of the checkpoint that a resume would take, whole in every bit; 0 for none."""
    kept = Checkpoints(root / "checkpoints")
    if not kept.all():
        return 0
    found = kept.newest()[1]
    same(found, checkpoint(found.state.epoch))
    return found.state.epoch


def same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.state == expected.state
    for a, b in ((found.model, expected.model), (found.optimizer, expected.optimizer)):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped(template: Path, scratch: Path, stop_at: int, **changes: object) -> ModelDisk:
    """The disk after a save that was cut off before its `stop_at`-th call."""
    shutil.copytree(template, scratch)
    disk = ModelDisk(scratch, stop_at=stop_at, **changes)
    with pytest.raises(Crash):
        written_by(scratch, disk)
    return disk


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_a_kill_at_every_call_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, num_before: int) -> None:
    template = run_folder(tmp_path / "template", num_before)
    calls = calls_of_a_save(template, tmp_path / "count")
    assert len(calls) >= 19 and any(call.startswith("rename") for call in calls)
    found = []
    for number in range(1, len(calls) + 1):
        root = tmp_path / str(number)
        stopped(template, root, number)
        found.append(epoch_found(root, num_before))
        written_by(root, ModelDisk(root))  # the next process saves as if nothing had been
        assert epoch_found(root, num_before) == 9
        assert len(list((root / "checkpoints").iterdir())) <= 2
    assert set(found) == {num_before, 9} if num_before == 2 else set(found) >= {num_before}
    assert found == sorted(found), "the new one is there from one call on"


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_a_power_loss_at_every_call_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, num_before: int) -> None:
    template = run_folder(tmp_path / "template", num_before)
    calls = calls_of_a_save(template, tmp_path / "count")
    draw, outcomes = random.Random(0), set()
    for number in range(1, len(calls) + 1):
        disk = stopped(template, tmp_path / str(number), number)
        for index, tree in enumerate(power_losses(disk, draw, NUM_RANDOM)):
            materialise(tree, tmp_path / f"{number}-{index}")
            outcomes.add(epoch_found(tmp_path / f"{number}-{index}", num_before))
    assert outcomes == {num_before, 9}


def test_what_a_finished_save_says_survives_a_power_loss(tmp_path: Path) -> None:
    template = run_folder(tmp_path / "template", 2)
    disk = ModelDisk(template)
    written_by(template, disk)
    for index, tree in enumerate(power_losses(disk, random.Random(0), 30)):
        materialise(tree, tmp_path / str(index))
        assert epoch_found(tmp_path / str(index), 2) == 9


def test_without_the_syncs_a_power_loss_would_lose_both(tmp_path: Path) -> None:
    """The negative control: the model of a power loss notices what the syncs are for."""
    template = run_folder(tmp_path / "template", 2)
    disk = ModelDisk(template, syncs=False)
    written_by(template, disk)
    lost = 0
    for index, tree in enumerate(power_losses(disk, random.Random(0), 30)):
        materialise(tree, tmp_path / str(index))
        try:
            lost += epoch_found(tmp_path / str(index), 2) != 9
        except LowmemError:
            lost += 1
    assert lost > 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("only_once", [True, False])
def test_an_error_at_every_call_is_told_and_loses_nothing(tmp_path: Path, number: int, only_once: bool) -> None:
    template = run_folder(tmp_path / "template", 2)
    calls = calls_of_a_save(template, tmp_path / "count")
    renamed = next(i for i, call in enumerate(calls, 1) if call.startswith("rename"))
    told = 0
    for call in range(1, len(calls) + 1):
        root = tmp_path / str(call)
        shutil.copytree(template, root)
        disk = ModelDisk(root, stop_at=call, stop_with=lambda: OSError(number, "injected"), only_once=only_once)
        try:
            written_by(root, disk)
        except LowmemError as error:
            told += 1
            text = str(error)
            assert "injected" in text and "It needs " in text and "bytes) are free" in text and str(root) in text
        assert epoch_found(root, 2) in ((2,) if call <= renamed else (2, 9))
        if only_once:
            assert not [p for p in (root / "checkpoints").iterdir() if p.name.endswith(".partial")]
            written_by(root, ModelDisk(root))
            assert epoch_found(root, 2) == 9
    assert told >= renamed


def test_a_small_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "template").mkdir()
    (tmp_path / "template" / "recipe.toml").write_text("old")
    disk = ModelDisk(tmp_path / "template")
    replace_file(disk.root / "recipe.toml", "new and longer", disk)
    for number in range(1, len(disk.calls) + 1):
        root = tmp_path / str(number)
        root.mkdir()
        (root / "recipe.toml").write_text("old")
        cut = ModelDisk(root, stop_at=number)
        with pytest.raises(Crash):
            replace_file(root / "recipe.toml", "new and longer", cut)
        assert (root / "recipe.toml").read_text() in ("old", "new and longer")
        for index, tree in enumerate(power_losses(cut, random.Random(0), NUM_RANDOM)):
            materialise(tree, tmp_path / f"{number}-{index}")
            assert (tmp_path / f"{number}-{index}" / "recipe.toml").read_text() in ("old", "new and longer")
