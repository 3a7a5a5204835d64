"""The average of weights and statistics: timm's arithmetic, one update a step, and the same under every plan."""

import pytest
import safetensors.torch
import torch
from timm.utils import ModelEmaV3

from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.synthetic import random_batches
from lowmem.memory.meter import host_memory
from lowmem.planning.devices import device_by_name
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import BlockPolicy, Budget, Plan
from lowmem.planning.planner import make_plan
from lowmem.planning.trace import trace_step
from lowmem.recipe import Recipe, recipe_from_tree
from lowmem.training.ema import ema_bytes
from lowmem.training.engine import Engine
from lowmem.training.model import initialised_model
from lowmem.training.step import TrainStep
from lowmem.verification import same_bits, verify
from tests.training.conftest import classifier, last_state

EMA = ("ema.decay=0.7", "ema.warmup=true")
PLACEMENTS = ("device", "backward", "host", "host_backward")


def small_recipe(decay: float | None = 0.9, warmup: bool = False, norm_batch: int | None = None) -> Recipe:
    return recipe_from_tree(
        {
            "model": {"name": "test_resnet", "weights": "none", "dropout": 0.2},
            "data": {"train_px": 32},
            "batch": {"size": 4} | ({"norm_batch": norm_batch} if norm_batch else {}),
            "ema": {"warmup": warmup} | ({"decay": decay} if decay is not None else {}),
            "optimizer": {"lr": 0.01, "layer_decay": 0.8, "exclude_norm_and_bias": True},
            "amp": "fp32",
        },
        "a test",
    )


def small_plan(**changes) -> Plan:
    return Plan(**({"device": "cpu", "device_name": "CPU", "amp_dtype": "fp32", "micro_batch": 4} | changes))


def engine_of(recipe: Recipe, plan: Plan) -> Engine:
    model, _ = initialised_model(recipe.model, 3, recipe.seed)
    return Engine(model, recipe, plan, torch.ones(3, dtype=torch.int64))


def step_through(engine: Engine, steps: range, after_step=lambda: None) -> None:
    batches = random_batches(engine.recipe, 3, steps.stop)
    device_input = DeviceInput(Normalisation((0.5,) * 3, (0.5,) * 3), engine.device, engine.plan.memory_format)
    for step in steps:
        engine.train_step(batches[step], device_input, epoch=1, step=step, lr=0.01)
        after_step()


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_timms_average_of_the_weights_after_each_step(warmup: bool) -> None:
    engine = engine_of(small_recipe(0.6, warmup, norm_batch=2), small_plan(micro_batch=2))
    timms, num_updates = ModelEmaV3(engine.model, decay=0.6, use_warmup=warmup), 0

    def update() -> None:
        nonlocal num_updates
        num_updates += 1
        timms.update(engine.model, step=num_updates)

    step_through(engine, range(4), update)
    average, weights = engine.evaluated_model.state_dict(), engine.model.state_dict()
    expected = timms.module.state_dict()
    assert all(same_bits(average[name], expected[name]) for name in expected)
    assert sum(not same_bits(average[name], weights[name]) for name in expected) > len(expected) // 2
    assert average["bn1.num_batches_tracked"] == weights["bn1.num_batches_tracked"] == 8


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_verify_compares_the_average(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"layer2.0": BlockPolicy(recompute="full"), "layer3.0": BlockPolicy(host="all")}
    recipe, plan = small_recipe(0.5), small_plan(optimizer=placement, blocks=blocks)
    comparison = verify(recipe, plan, 3, steps=2)
    kinds = {kind.kind: kind for kind in comparison.kinds}
    assert (
        comparison.holds
        and kinds["average"].num_entries == kinds["weights"].num_entries + kinds["buffers"].num_entries + 1
    )
    if placement != "device":
        return
    update = TrainStep.__call__

    def nudged(self: TrainStep, *arguments):
        loss = update(self, *arguments)
        if self.plan.blocks:
            with torch.no_grad():
                next(self.model.parameters()).add_(2**-20)
        return loss

    monkeypatch.setattr(TrainStep, "__call__", nudged)
    spoilt = {kind.kind: kind for kind in verify(recipe, plan, 3, steps=2).kinds}
    assert spoilt["average"].num_differing


def test_it_survives_a_change_of_plan() -> None:
    recipe = small_recipe(0.5, warmup=True)
    straight, changed = engine_of(recipe, small_plan()), engine_of(recipe, small_plan())
    step_through(straight, range(3))
    step_through(changed, range(2))
    changed.adopt(small_plan(optimizer="host"))
    step_through(changed, range(2, 3))
    a, b = straight.optimizer_tensors(), changed.optimizer_tensors()
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_validation_and_the_classifier_use_it(train_run) -> None:
    run, plain = train_run("average", *EMA), train_run("plain")
    state, trained = last_state(run), last_state(plain)
    kept = classifier(run)
    assert all(same_bits(trained[name], state[name]) for name in trained), "the average does not change the training"
    assert sum(same_bits(kept[name], state[f"ema/{name}"]) for name in kept) in (0, len(kept)), (
        "of one epoch or another"
    )
    assert safetensors.torch.load_file(run / "classifier" / "model.safetensors").keys() == classifier(plain).keys()
    assert any(not same_bits(kept[name], classifier(plain)[name]) for name in kept)
    assert (run / "epochs.csv").read_text().splitlines()[1].split(",")[2] != (
        plain / "epochs.csv"
    ).read_text().splitlines()[1].split(",")[2]


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_planner_counts_it(decay: float | None) -> None:
    """Against the counted peak of real steps, and against the trace without it."""
    recipe = small_recipe(decay)
    network = FakeNetwork(recipe, 3)
    predicted = trace_step(network, small_plan(autocast_cache=False), recipe)
    engine = engine_of(recipe, small_plan(autocast_cache=False, budget=Budget(total_bytes=2**30)))
    with host_memory():
        engine.enforcement.reset_peak()
    step_through(engine, range(2))
    assert abs(engine.enforcement.peak_bytes / predicted.peak_bytes - 1) < 0.002
    expected = ema_bytes(engine.model, recipe.ema)
    assert predicted.breakdown.ema == expected and (expected > 0) == (decay is not None)


def test_a_plan_has_room_for_it() -> None:
    cpu = device_by_name("cpu")
    plans = [make_plan(small_recipe(decay), cpu, "cpu", 2**30, num_classes=3, num_train=64) for decay in (None, 0.9)]
    plain, averaged = (plan.prediction for plan in plans)
    assert averaged.peak.total - plain.peak.total == averaged.peak.ema > 0
    assert averaged.step_s > plain.step_s
