"""Layer-wise learning rates and exempt weights: timm's own groups, and bitwise the same in every placement."""

import pytest
import torch
from memory_helpers import differing, end_state, make_plan, make_recipe
from timm.optim import create_optimizer_v2

from lowmem.memory.optimizer import place_optimizer
from lowmem.memory.rates import Rates, rates_by_name
from lowmem.recipe import ModelRecipe, OptimizerRecipe, Recipe
from lowmem.training.model import build_model

PLACEMENTS = ("backward", "host", "host_backward")


def model_of(name: str) -> torch.nn.Module:
    return build_model(ModelRecipe(name=name, weights="none"), 3)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "seresnext26d_32x4d"])
def test_the_rates_are_timms(name: str, layer_decay: float | None) -> None:
    model = model_of(name)
    timms = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
    expected = {
        id(p): Rates(group.get("lr_scale", 1.0), group["weight_decay"])
        for group in timms.param_groups
        for p in group["params"]
    }
    recipe = OptimizerRecipe(weight_decay=0.05, layer_decay=layer_decay, exclude_norm_and_bias=True)
    found = rates_by_name(model, recipe)
    assert found == {name: expected[id(p)] for name, p in model.named_parameters()}
    assert len(set(found.values())) > (5 if layer_decay else 1)


def test_without_either_option_every_weight_has_one_rate() -> None:
    rates = rates_by_name(model_of("test_vit"), OptimizerRecipe(weight_decay=0.05))
    assert set(rates.values()) == {Rates(1.0, 0.05)}
    decayed = rates_by_name(model_of("test_vit"), OptimizerRecipe(weight_decay=0.05, layer_decay=0.5))
    assert {item.weight_decay for item in decayed.values()} == {0.05}
    assert max(item.lr_scale for item in decayed.values()) == 1.0 == decayed["head.weight"].lr_scale


def with_rates(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update=changes)})


@pytest.mark.parametrize("staging_bytes", [2**25, 200 * 1024])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_placements_are_bitwise_with_rates(name: str, staging_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.memory.host_optimizer.STAGING_BYTES", staging_bytes)
    monkeypatch.setattr("lowmem.memory.host_optimizer.CHUNK_ELEMENTS", staging_bytes // 8)
    recipe = with_rates(make_recipe(name), layer_decay=0.6, exclude_norm_and_bias=True, weight_decay=0.5)
    expected = end_state(recipe, make_plan(), num_steps=3)
    for placement in PLACEMENTS:
        assert not differing(expected, end_state(recipe, make_plan(optimizer=placement), num_steps=3)), placement
    for changes in ({"layer_decay": None}, {"exclude_norm_and_bias": False}):
        assert differing(expected, end_state(with_rates(recipe, **changes), make_plan(), num_steps=3)), changes


def test_the_step_is_timms() -> None:
    """Two steps beside timm's optimizer with its own scheduler's scaling of the rate."""
    recipe = OptimizerRecipe(weight_decay=0.05, layer_decay=0.7, exclude_norm_and_bias=True)
    ours, theirs = model_of("test_vit"), model_of("test_vit")
    theirs.load_state_dict(ours.state_dict())
    placed = place_optimizer(ours, recipe, "device", torch.device("cpu"))
    timms = create_optimizer_v2(theirs, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.7, fused=True)
    for group in timms.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    placed.set_lr(1e-2)
    for seed in range(2):
        images_BCHW = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(seed))
        for model in (ours, theirs):
            model(images_BCHW).square().sum().backward()
        placed.update(None, None)
        timms.step()
        timms.zero_grad()
    assert not differing(dict(ours.state_dict()), dict(theirs.state_dict()))
