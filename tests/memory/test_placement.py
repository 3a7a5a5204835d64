"""Optimizer placements: weights and state end bitwise equal, with accumulation, clipping and a scaler."""

from typing import get_args

import pytest
import torch
from memory_helpers import differing, end_state, make_engine, make_plan, make_recipe, policies, run_steps, state_of
from torch import nn

from lowmem.errors import LowmemError
from lowmem.memory.meter import MemoryMeter
from lowmem.memory.optimizer import BackwardOptimizer, place_optimizer
from lowmem.planning.plan import Placement
from lowmem.recipe import OptimizerRecipe

SCALER_STEPS = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


PLACEMENTS = [placement for placement in get_args(Placement) if placement != "device"]


def _stage_through(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr("lowmem.memory.host_optimizer.STAGING_BYTES", num_bytes)
    monkeypatch.setattr("lowmem.memory.host_optimizer.CHUNK_ELEMENTS", num_bytes // 8, raising=False)


@pytest.fixture(params=[2**25, 200 * 1024], ids=["one buffer", "many groups"])
def staging_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    _stage_through(monkeypatch, request.param)
    return int(request.param)


@pytest.mark.parametrize("norm_batch", [None, 2])
def test_placements_are_bitwise(staging_bytes: int, norm_batch: int | None) -> None:
    recipe, micro_batch = make_recipe("test_resnet", norm_batch=norm_batch), norm_batch or 4
    expected = end_state(recipe, make_plan(micro_batch=micro_batch), num_steps=3)
    assert float(expected["step/conv1.0.weight" if "step/conv1.0.weight" in expected else "step/conv1.weight"]) == 3
    for placement in PLACEMENTS:
        for kind in ("none", "full"):
            plan = make_plan(micro_batch=micro_batch, optimizer=placement, blocks=policies("test_resnet", kind))
            assert not differing(expected, end_state(recipe, plan, num_steps=3)), (placement, kind)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_placements_are_bitwise_without_batch_norm(name: str) -> None:
    recipe = make_recipe(name)
    expected = end_state(recipe, make_plan(amp_dtype="bf16"), num_steps=3)
    for placement in PLACEMENTS:
        plan = make_plan(amp_dtype="bf16", optimizer=placement, blocks=policies(name, "selective_offload"))
        assert not differing(expected, end_state(recipe, plan, num_steps=3)), placement


def test_clipping_on_the_device_and_on_the_host(staging_bytes: int) -> None:
    recipe = make_recipe("test_resnet", norm_batch=2, clip_norm=0.01)
    expected = end_state(recipe, make_plan(micro_batch=2), num_steps=3)
    assert not differing(expected, end_state(recipe, make_plan(micro_batch=2, optimizer="host"), num_steps=3))
    assert differing(
        expected, end_state(make_recipe("test_resnet", norm_batch=2), make_plan(micro_batch=2), num_steps=3)
    )


def test_clipping_and_fp16_are_refused_in_the_backward_pass() -> None:
    with pytest.raises(LowmemError, match="clip_norm"):
        make_engine(make_recipe("test_resnet", clip_norm=1.0), make_plan(optimizer="backward"))
    with pytest.raises(LowmemError, match="fp16"):
        make_engine(make_recipe("test_resnet"), make_plan(optimizer="backward", amp_dtype="fp16"))


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_a_scaler_with_either_placement(clip_norm: float | None, staging_bytes: int) -> None:
    recipe = make_recipe("test_vit", norm_batch=2, clip_norm=clip_norm)
    states = []
    for placement in ("device", "host"):
        engine = make_engine(recipe, make_plan(amp_dtype="fp16", micro_batch=2, optimizer=placement))
        engine.load_scaler_state(SCALER_STEPS | {"scale": 1024.0})
        run_steps(engine, range(2))
        assert engine.scaler_state()["scale"] == 1024.0
        states.append(state_of(engine))
    assert not differing(*states)
    assert float(states[0]["step/head.weight"]) == 2


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_step_whose_gradients_overflow_is_skipped(placement: str, clip_norm: float | None) -> None:
    engine = make_engine(make_recipe("test_vit", clip_norm=clip_norm), make_plan(amp_dtype="fp16", optimizer=placement))
    engine.load_scaler_state(SCALER_STEPS | {"scale": 1024.0})
    run_steps(engine, [0])
    before = state_of(engine)
    engine.load_scaler_state(SCALER_STEPS | {"scale": 2.0**100})
    run_steps(engine, [1])
    assert not differing(before, state_of(engine))
    assert engine.scaler_state()["scale"] == 2.0**99
    engine.load_scaler_state(SCALER_STEPS | {"scale": 1024.0})
    run_steps(engine, [2])
    assert differing(before, state_of(engine))


def test_gradients_are_gone_and_state_is_where_it_should_be() -> None:
    peaks = {}
    for placement in ("device", "backward", "host"):
        engine = make_engine(make_recipe("test_efficientnet"), make_plan(optimizer=placement))
        run_steps(engine, [0])
        assert all(parameter.grad is None for parameter in engine.model.parameters())
        peaks[placement] = sum(tensor.nbytes for tensor in engine.optimizer.device_tensors())
        num_weights = sum(parameter.numel() for parameter in engine.model.parameters())
        assert placement == "host" or 8 * num_weights <= peaks[placement] <= 8 * num_weights + 4 * 200
        engine.close()


def test_the_host_placement_stages_through_a_bounded_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    _stage_through(monkeypatch, 64 * 1024)
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])  # 32 KiB of state each
    optimizer = place_optimizer(model, OptimizerRecipe(), "host", torch.device("cpu"))
    assert sum(tensor.nbytes for tensor in optimizer.device_tensors()) == 2 * 64 * 1024 + 8 * 4
    model(torch.ones(2, 64)).sum().backward()
    with MemoryMeter() as meter:
        meter.adopt(
            [*model.parameters(), *(p.grad for p in model.parameters()), *optimizer.device_tensors()], "resident"
        )
        resident = meter.live_bytes
        optimizer.update(None, None)
        assert meter.peak_bytes <= resident + 1024


def test_gradients_are_freed_during_the_backward_pass() -> None:
    peaks = {}
    for placement in ("device", "backward"):
        model = nn.Sequential(*[nn.Linear(128, 128, bias=False) for _ in range(8)])  # 64 KiB each
        optimizer = place_optimizer(model, OptimizerRecipe(), placement, torch.device("cpu"))
        with MemoryMeter() as meter:
            optimizer.arm()
            model(torch.ones(1, 128)).sum().backward()
            optimizer.update(None, None)
            peaks[placement] = meter.peak_bytes
    assert peaks["device"] - peaks["backward"] > 6 * 65536


def test_a_weight_that_only_an_early_micro_batch_reaches_is_updated() -> None:
    states = []
    for placement in ("device", "backward"):
        torch.manual_seed(0)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        optimizer = place_optimizer(nn.ModuleList([first, second]), OptimizerRecipe(), placement, torch.device("cpu"))
        first(torch.ones(1, 4)).sum().backward()
        optimizer.arm()
        second(torch.ones(1, 4)).sum().backward()
        optimizer.update(None, None)
        states.append(dict(first.state_dict()) | dict(second.state_dict(prefix="second.")) | optimizer.state_tensors())
    assert not differing(*states)


def test_the_state_of_another_model_is_refused() -> None:
    optimizer = place_optimizer(nn.Linear(2, 2), OptimizerRecipe(), "backward", torch.device("cpu"))
    assert isinstance(optimizer, BackwardOptimizer)
    with pytest.raises(LowmemError, match="does not fit"):
        optimizer.load_state_tensors({"exp_avg/other": torch.zeros(2)})
    optimizer.close()


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_placements_are_bitwise_on_cuda(amp: str, clip_norm: float | None, staging_bytes: int) -> None:
    recipe = make_recipe("test_vit", norm_batch=2, clip_norm=clip_norm)
    torch.use_deterministic_algorithms(True, warn_only=True)
    states = {}
    for placement in ("device", "host") if clip_norm or amp == "fp16" else ("device", *PLACEMENTS):
        engine = make_engine(recipe, make_plan(device="cuda:0", micro_batch=2, amp_dtype=amp, optimizer=placement))
        run_steps(engine, range(20))
        states[placement] = state_of(engine)
        engine.close()
    torch.use_deterministic_algorithms(False)
    assert all(not differing(states["device"], state) for state in states.values())


@pytest.mark.cuda
@pytest.mark.parametrize("placement", ["device", "host"])
def test_an_overflow_on_cuda_is_skipped(placement: str) -> None:
    engine = make_engine(make_recipe("test_vit"), make_plan(device="cuda:0", amp_dtype="fp16", optimizer=placement))
    engine.load_scaler_state(SCALER_STEPS | {"scale": 2.0**100})
    before = state_of(engine)
    run_steps(engine, [0])
    assert not differing(before, state_of(engine))
    assert engine.scaler_state()["scale"] == 2.0**99
