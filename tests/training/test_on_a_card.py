"""Whole runs on a card: resume, fp16, memory that runs out, validation in the budget. On the CPU they show that the tests are sound."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lowmem.planning.plan import BlockPolicy, Budget
from lowmem.sizes import GIB, MIB
from lowmem.training.engine import Engine
from lowmem.training.resume import ResumeRequest, resume_run
from lowmem.training.start import TrainRequest, train_new_run
from lowmem.verification import same_bits
from tests.training.conftest import TINY, last_state

pytestmark = pytest.mark.usefixtures("deterministic", "whole_card")


@pytest.fixture
def amp(device: str) -> str:
    return "fp16" if device.startswith("cuda") else "fp32"


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


def on(device: str, amp: str, **changes: Any) -> dict[str, Any]:
    """Fields of a plan; kernels are not chosen by trial, which may end otherwise each time."""
    return {"device": device, "amp_dtype": amp, "cudnn_benchmark": False} | changes


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_a_stopped_run_goes_on_bitwise_with_its_scaler_under_another_plan(
    train_run: Any, device: str, amp: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fp16 on a card, whose scaler must be where it was."""
    whole = train_run("whole", f"amp={amp}", **on(device, amp))
    step, calls = Engine.train_step, []

    def interrupted(self: Engine, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Engine, "train_step", interrupted)
    with pytest.raises(AssertionError):  # the fixture wants a run that ends
        train_run("stopped", f"amp={amp}", **on(device, amp))
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(Engine, "train_step", step)
    plan = json.loads((stopped / "plan.json").read_text())
    full = {name: json.loads(BlockPolicy(recompute="full").model_dump_json()) for name in ("layer2.0", "layer3.0")}
    (stopped / "plan.json").write_text(json.dumps(plan | {"blocks": full, "optimizer": "host"}))
    assert resume_run(ResumeRequest(stopped)) == 0
    assert not differing(last_state(whole), last_state(stopped))
    assert not differing(
        *(safetensors.torch.load_file(r / "classifier" / "model.safetensors") for r in (whole, stopped))
    )
    if amp == "fp16":
        newest = [
            json.loads((sorted((r / "checkpoints").iterdir())[-1] / "state.json").read_text()) for r in (whole, stopped)
        ]
        assert newest[0]["scaler"] == newest[1]["scaler"] and newest[0]["scaler"]["scale"] > 1


def test_memory_that_runs_out_in_a_run_changes_nothing_but_its_plan(train_run: Any, device: str) -> None:
    """The run begins with a plan that does not fit; the limit is the allocator's on a card."""
    overrides = ("data.train_px=160", "batch.size=16", "amp=fp32")
    whole = train_run("whole", *overrides, **on(device, "fp32", micro_batch=16))
    limit = 95 * MIB if device == "cpu" else int(0.95 * torch.cuda.max_memory_reserved())
    tight = train_run("tight", *overrides, **on(device, "fp32", micro_batch=16, budget=Budget(total_bytes=limit)))
    assert events(tight, "leaner_plan") and not events(whole, "leaner_plan")
    assert not differing(last_state(whole), last_state(tight))
    if device != "cpu":
        assert torch.cuda.memory_reserved() <= limit


@pytest.mark.cuda
def test_validation_at_320_px_stays_in_the_budget(photos: Path, tmp_path: Path) -> None:
    budget = 2 * GIB
    request = TrainRequest(
        data=photos, device="cuda:0", vram="2G", out=tmp_path / "run",
        overrides=(*TINY, "model.name=resnet50", "data.train_px=224", "data.val_px=320", "data.test_px=320", "amp=bf16"),
    )  # fmt: skip
    assert train_new_run(request) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    limit = Budget.model_validate(plan["budget"]).allocator_bytes
    assert torch.cuda.max_memory_reserved() <= limit < budget
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["px"] == 320
