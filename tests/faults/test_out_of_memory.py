"""F10: memory runs out in step k of a run: the same recipe goes on under a leaner plan, to the same classifier."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem.errors import LowmemError
from lowmem.training.engine import Engine
from tests.faults.harness import STEPS_PER_EPOCH, differing, make_plan_file
from tests.faults.stops import TinyRun, hook_steps

HUGE = 2**40


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("whole")
    run = TinyRun(photos, make_plan_file(root / "plan.json"), root / "run")
    assert run.train() == 0
    return run.end()


def out_of_memory_in(engine: Engine, block: str, backward: bool) -> None:
    """The next forward or backward pass of a block asks for far too much, once."""

    def ask(module: Any, *_: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError(f"out of memory: tried to allocate {HUGE} bytes")

    module = engine.model.get_submodule(block)
    handle = module.register_full_backward_hook(ask) if backward else module.register_forward_pre_hook(ask)


@pytest.mark.parametrize("at", [(1, 0), (2, 2)])
@pytest.mark.parametrize(("optimizer", "backward"), [("device", False), ("backward", False), ("backward", True)])
def test_the_run_goes_on_under_a_leaner_plan(
    photos: Path, whole: dict[str, Any], tmp_path: Path, at: tuple[int, int], optimizer: str, backward: bool
) -> None:
    """An update in the backward pass cannot be taken back: the newest checkpoint is, and the steps since are trained again."""
    budget = {"total_bytes": 2**30}
    run = TinyRun(photos, make_plan_file(tmp_path / "plan.json", budget=budget, optimizer=optimizer), tmp_path / "run")
    steps, struck = [], []

    def strike(engine: Engine, epoch: int, step: int) -> None:
        steps.append((epoch, step))
        if (epoch, step) == at and not struck:
            struck.append(True)
            out_of_memory_in(engine, "layer3.0", backward)

    from lowmem.training.start import TrainRequest, train_new_run
    from tests.faults.harness import TINY

    request = TrainRequest(data=photos, device="cpu", out=run.out, overrides=TINY, plan_file=run.plan)
    with hook_steps(strike):
        assert train_new_run(request) == 0
    events = [json.loads(line) for line in (run.out / "events.jsonl").read_text().splitlines()]
    leaner = [event for event in events if event["event"] == "leaner_plan"]
    assert len(leaner) == 1 and (leaner[0]["epoch"], leaner[0]["step"]) == at
    assert differing(whole, run.end()) == []
    repeated = len(steps) - 3 * STEPS_PER_EPOCH
    assert repeated == (1 + at[1] if backward else 1), (
        "the failed step, and what came after the checkpoint"
    )


def test_where_nothing_fits_the_smallest_budget_that_does_is_named(photos: Path, tmp_path: Path) -> None:
    run = TinyRun(photos, make_plan_file(tmp_path / "plan.json", budget={"total_bytes": 10**6}), tmp_path / "run")
    with pytest.raises(LowmemError, match="the leanest plan needs .* Use --vram"):
        run.train()
    assert run.resume(vram="1G") == 0
