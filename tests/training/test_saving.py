"""A checkpoint is written beside training, of the state as it was when it was asked for."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.disk import Disk, OpenFile
from lowmem.errors import LowmemError
from lowmem.planning.plan import Plan
from lowmem.recipe import BatchRecipe, DataRecipe, ModelRecipe, Recipe
from lowmem.training.checkpoint import Checkpoints, read_checkpoint
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.training.saving import Saver
from lowmem.training.schedule import first_state
from lowmem.training.state import RunState
from lowmem.verification import same_bits

RECIPE = Recipe(
    model=ModelRecipe(name="test_resnet", weights="none"),
    data=DataRecipe(train_px=32),
    batch=BatchRecipe(size=4),
    amp="fp32",
)
STATE = RunState(recipe=RECIPE, epoch=1, step=0, schedule=first_state(RECIPE), scaler=None, seed=0, dataset="x")


class SlowDisk(Disk):
    """Waits before the first file, as a slow disk would, until `go` is set."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def create(self, path: Path) -> OpenFile:
        self.reached.set()
        assert self.go.wait(30)
        return super().create(path)


class FullDisk(Disk):
    def mkdir(self, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=["device", "backward", "host", "host_backward"])
def engine(request: pytest.FixtureRequest) -> Engine:
    model, _ = initialised_model(RECIPE.model, 3, 0)
    plan = Plan(device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=4, optimizer=request.param)
    return Engine(model, RECIPE, plan, torch.ones(3, dtype=torch.int64))


def step(engine: Engine, number: int) -> None:
    batch = random_batches(RECIPE, 3, number + 1)[number]
    norm = Normalisation((0.5,) * 3, (0.5,) * 3)
    engine.train_step(batch, DeviceInput(norm, engine.device, "channels_last"), 1, number, 1e-3)


def test_steps_go_on_while_the_state_of_before_is_written(engine: Engine, tmp_path: Path) -> None:
    disk, paths = SlowDisk(), []
    with Saver(Checkpoints(tmp_path / "c", disk), lambda path, seconds, host_bytes: paths.append(path)) as saver:
        step(engine, 0)
        before = engine.model_tensors() | engine.optimizer_tensors()
        saver.save(engine, STATE)
        assert disk.reached.wait(30) and saver.busy
        step(engine, 1)
        disk.go.set()
        saver.wait()
        assert not saver.busy and len(paths) == 1
    read = read_checkpoint(paths[0])
    written = read.model | read.optimizer
    assert written.keys() == before.keys() and all(same_bits(before[name], written[name]) for name in before)
    after = engine.model_tensors() | engine.optimizer_tensors()
    assert not all(same_bits(after[name], written[name]) for name in after)


def test_one_buffer_is_used_again_and_again(engine: Engine, tmp_path: Path) -> None:
    with Saver(Checkpoints(tmp_path / "c")) as saver:
        first = {name: tensor.data_ptr() for name, tensor in saver.copy(engine, STATE).model.items()}
        num_bytes = saver.host_bytes
        saver.save(engine, STATE)
        assert first == {name: tensor.data_ptr() for name, tensor in saver.copy(engine, STATE).model.items()}
        tensors = [*engine.model_tensors().values(), *engine.optimizer_tensors().values()]
        assert saver.host_bytes == num_bytes == sum(tensor.nbytes for tensor in tensors)


def test_the_error_of_a_write_is_raised_by_the_next_look(engine: Engine, tmp_path: Path) -> None:
    with Saver(Checkpoints(tmp_path / "c", FullDisk())) as saver:
        saver.save(engine, STATE)
        with pytest.raises(LowmemError, match="No space left"):
            saver.wait()
        saver.check()
        saver.save(engine, STATE)
        saver._join()
        with pytest.raises(LowmemError, match="No space left"):
            saver.check()
