"""F6, F7, F14 and the command `resume`: the same stream of images and the same weights, wherever a run was stopped."""

import itertools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.data.loader import Loader
from lowmem.errors import LowmemError
from lowmem.planning.plan import BlockPolicy
from lowmem.recipe import load_recipe
from lowmem.training.checkpoint import Checkpoints
from lowmem.training.resume import ResumeRequest, resume_run
from tests.faults.harness import STEPS_PER_EPOCH, differing, make_plan_file
from tests.faults.stops import EVERY_STEP, EXIT_STOPPED, tiny, whole


def stopped_and_resumed(photos: Path, folder: Path, at: tuple[int, int], workers: int, atoms: int) -> None:
    expected = whole(photos, folder, atoms)
    run, steps = tiny(photos, folder, "run", workers, atoms), []
    assert run.train(stop_in=at, seen=steps) == EXIT_STOPPED
    assert run.resume(seen=steps) == 0
    assert steps == EVERY_STEP, "no step is skipped or repeated"
    assert differing(expected, run.end()) == []


@pytest.mark.parametrize("at", EVERY_STEP[1::3])
def test_stopped_in_a_step(photos: Path, tmp_path: Path, at: tuple[int, int]) -> None:
    stopped_and_resumed(photos, tmp_path, at, workers=0, atoms=1)


@pytest.mark.parametrize(("at", "workers", "atoms"), [((1, 1), 2, 4), ((2, 3), 4, 1), ((2, 0), 4, 4), ((3, 2), 0, 4)])
def test_stopped_in_a_step_with_workers_and_accumulation(
    photos: Path, tmp_path: Path, at: Any, workers: int, atoms: int
) -> None:
    stopped_and_resumed(photos, tmp_path, at, workers, atoms)


@pytest.mark.fault
@pytest.mark.parametrize("at", EVERY_STEP)
@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("atoms", [1, 4])
def test_stopped_in_every_step(photos: Path, tmp_path: Path, at: tuple[int, int], workers: int, atoms: int) -> None:
    stopped_and_resumed(photos, tmp_path, at, workers, atoms)


def test_stopped_in_a_validation(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut short, and the run begins with it again."""
    expected = whole(photos, tmp_path)
    batches, validations = Loader.batches, []

    def interrupted(self: Loader, epoch: int = 0, start: int = 0) -> Iterator[Any]:
        if self.shuffle_seed is None:
            validations.append(1)
            if len(validations) == 2:
                signal.raise_signal(signal.SIGINT)
        return batches(self, epoch, start)

    monkeypatch.setattr(Loader, "batches", interrupted)
    run, steps = tiny(photos, tmp_path), []
    assert run.train(seen=steps) == EXIT_STOPPED
    assert Checkpoints(run.out / "checkpoints").newest()[0].name.endswith(f"epoch2-step{STEPS_PER_EPOCH}")
    assert run.resume(seen=steps) == 0
    assert steps == EVERY_STEP and len(validations) == 4
    assert differing(expected, run.end()) == []


def test_stopped_twice_in_one_epoch_under_three_plans(photos: Path, tmp_path: Path) -> None:
    """F7: other workers, other placement, other policies: the same stream and, as all are bitwise, the same weights."""
    expected = whole(photos, tmp_path)
    run, steps = tiny(photos, tmp_path), []
    assert run.train(stop_in=(2, 0), seen=steps) == EXIT_STOPPED
    blocks = {"layer2.0": BlockPolicy(recompute="full"), "layer3.0": BlockPolicy(recompute="full")}
    shutil.copy(make_plan_file(tmp_path / "b.json", 2, optimizer="host", blocks=blocks), run.out / "plan.json")
    assert run.resume((2, 2), seen=steps) == EXIT_STOPPED
    shutil.copy(make_plan_file(tmp_path / "c.json", 4, optimizer="backward"), run.out / "plan.json")
    assert run.resume(seen=steps) == 0
    assert steps == EVERY_STEP
    assert differing(expected, run.end()) == []


def test_resumed_in_another_budget(photos: Path, tmp_path: Path) -> None:
    expected = whole(photos, tmp_path)
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(1, 2)) == EXIT_STOPPED
    assert run.resume(vram="7M") == 0
    plan = json.loads((run.out / "plan.json").read_text())
    assert plan["budget"]["total_bytes"] == 7 * 2**20 and (plan["blocks"] or plan["optimizer"] != "device")
    assert plan["exactness"] == "bitwise" and differing(expected, run.end()) == []


@pytest.mark.parametrize("dropped", ["start", "epoch", "losses", "lr"])
def test_a_resume_that_forgets_something_is_noticed(
    photos: Path, tmp_path: Path, dropped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative controls: without the loader's position (or another part of the state) the comparison fails."""
    expected = whole(photos, tmp_path)
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(2, 1)) == EXIT_STOPPED
    if dropped in ("start", "epoch"):
        batches = Loader.batches

        def forgetful(self: Loader, epoch: int = 0, start: int = 0) -> Iterator[Any]:
            if dropped == "start":
                yield from itertools.islice(batches(self, epoch, 0), STEPS_PER_EPOCH - start)
            else:
                yield from batches(self, 1 if epoch == 2 else epoch, start)

        monkeypatch.setattr(Loader, "batches", forgetful)
    newest = Checkpoints.newest

    def without(self: Checkpoints) -> Any:
        path, found, problems = newest(self)
        state = found.state
        if dropped == "losses":
            state = state.model_copy(update={"losses": (0.0,) * len(state.losses)})
        if dropped == "lr":
            state = state.model_copy(update={"schedule": state.schedule.model_copy(update={"lr": 5e-4})})
        return path, type(found)(state, found.model, found.optimizer), problems

    monkeypatch.setattr(Checkpoints, "newest", without)
    assert run.resume() == 0
    assert differing(expected, run.end()) != []


def test_a_finished_run_is_extended(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path, "run", 0, 1, "schedule.epochs=2")
    assert run.train() == 0
    assert run.resume(None, "schedule.epochs=3") == 0
    assert differing(whole(photos, tmp_path), run.end()) == []


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, steps = tiny(photos, tmp_path), []
    assert run.train() == 0
    before = run.end()
    assert run.resume(seen=steps) == 0
    assert steps == [] and differing(before, run.end()) == []
    assert "is finished" in (told := capsys.readouterr().out) and "--set schedule.epochs=" in told


def test_a_run_that_stopped_early_goes_on(photos: Path, tmp_path: Path) -> None:
    """With a rate of nothing no epoch is better than the first."""
    run, steps = tiny(photos, tmp_path, "run", 0, 1, "optimizer.lr=1e-30", "schedule.early_stopping=1"), []
    assert run.train() == 0
    stopped_in = Checkpoints(run.out / "checkpoints").newest()[1].state
    assert stopped_in.finished and stopped_in.epoch == 3 <= stopped_in.recipe.schedule.epochs
    assert run.resume(None, "schedule.early_stopping=0", seen=steps) == 0
    assert steps == [(3, step) for step in range(STEPS_PER_EPOCH)]
    assert differing(whole(photos, tmp_path, 1, "optimizer.lr=1e-30"), run.end()) == []


def test_a_new_plan_on_request_needs_a_budget(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(1, 1)) == EXIT_STOPPED
    with pytest.raises(LowmemError, match="--allow: .* Add --vram"):
        resume_run(ResumeRequest(run.out, allow="statistical"))
    with pytest.raises(LowmemError, match="exactness|bitwise"):
        resume_run(ResumeRequest(run.out, allow="nothing", vram="1G"))
    with pytest.raises(LowmemError, match="cuda|device"):
        resume_run(ResumeRequest(run.out, device="cuda:99", vram="1G"))


def test_a_change_of_the_recipe_is_made_and_recorded(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(2, 0)) == EXIT_STOPPED
    assert run.resume((2, 1), "optimizer.lr=1e-4") == EXIT_STOPPED
    assert run.resume(None, "augment.flip_prob=0", "optimizer.weight_decay=0.01") == 0
    recipe = load_recipe(str(run.out / "recipe.toml"))
    assert (recipe.optimizer.lr, recipe.augment.flip_prob, recipe.optimizer.weight_decay) == (1e-4, 0, 0.01)
    notes = [line for line in (run.out / "recipe.toml").read_text().splitlines() if line.startswith("#")]
    assert notes == [
        "# changed on purpose before step 2 of epoch 2: optimizer.lr: 0.001 -> 0.0001",
        "# changed on purpose before step 3 of epoch 2: augment.flip_prob: 0.5 -> 0.0; optimizer.weight_decay: 0.001 -> 0.01",
    ]
    events = [json.loads(line) for line in (run.out / "events.jsonl").read_text().splitlines()]
    assert [e["changes"] for e in events if e["event"] == "recipe_changed"][0] == ["optimizer.lr: 0.001 -> 0.0001"]
    state = Checkpoints(run.out / "checkpoints").newest()[1].state
    assert state.recipe == recipe and state.schedule.lr <= 1e-4
    assert differing(whole(photos, tmp_path), run.end()) != []


def test_an_edit_of_the_copy_changes_nothing_and_is_told(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(2, 0)) == EXIT_STOPPED
    file = run.out / "recipe.toml"
    file.write_text(file.read_text().replace("lr = 0.001", "lr = 0.1"))
    assert run.resume() == 0
    assert "lowmem resume --set" in capsys.readouterr().out
    assert differing(whole(photos, tmp_path), run.end()) == []
    assert load_recipe(str(file)).optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed"),
        ("model.name=resnet18", "model.name"),
        ("data.val_fraction=0.3", "data.val_fraction"),
        ("batch.size=4", "batch.size"),
        ("mixup.prob=0.1", "--vram"),
        ("optimizer.Ir=1", "optimizer.lr"),
    ],
)
def test_changes_that_a_run_cannot_take_are_refused(photos: Path, tmp_path: Path, override: str, named: str) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(1, 1)) == EXIT_STOPPED
    files = sorted(path for path in run.out.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(LowmemError, match=named):
        run.resume(None, override)
    assert before == {path: path.read_bytes() for path in sorted(run.out.rglob("*")) if path.is_file()}


def test_the_batch_may_change_at_an_epochs_end(photos: Path, tmp_path: Path) -> None:
    run, steps = tiny(photos, tmp_path, "run", 0, 1, "schedule.epochs=1"), []
    assert run.train() == 0
    assert run.resume(None, "batch.size=4", "schedule.epochs=2", vram="1G", seen=steps) == 0
    assert steps == [(2, step) for step in range(8)]


def test_without_any_checkpoint_a_run_starts_from_the_beginning(photos: Path, tmp_path: Path) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(1, 0)) == EXIT_STOPPED
    shutil.rmtree(run.out / "checkpoints")
    assert run.resume() == 0
    assert differing(whole(photos, tmp_path), run.end()) == []


def test_a_damaged_checkpoint_is_passed_over_and_told(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny(photos, tmp_path)
    assert run.train(stop_in=(3, 1)) == EXIT_STOPPED
    newest = Checkpoints(run.out / "checkpoints").all()[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (newest / "model.safetensors").write_bytes(data)
    assert run.resume() == 0
    assert newest.name in (told := capsys.readouterr().out) and "passed over" in told and "checksum" in told
    assert differing(whole(photos, tmp_path), run.end()) == []
