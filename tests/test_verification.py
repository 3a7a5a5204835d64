"""The comparison finds what differs and only that."""

import torch

from lowmem.data.synthetic import random_batches
from lowmem.planning.plan import BlockPolicy, Plan
from lowmem.recipe import BatchRecipe, DataRecipe, MixupRecipe, ModelRecipe, Recipe
from lowmem.verification import same_bits, verify


def recipe(name: str, norm_batch: int | None = None) -> Recipe:
    return Recipe(
        model=ModelRecipe(name=name, weights="none"),
        data=DataRecipe(train_px=48),
        batch=BatchRecipe(size=4, norm_batch=norm_batch),
        mixup=MixupRecipe(prob=1.0),
        amp="fp32",
    )


def plan(**changes: object) -> Plan:
    return Plan.model_validate({"device": "cpu", "device_name": "CPU", "amp_dtype": "fp32", "micro_batch": 4} | changes)


def test_policies_and_placement_are_bitwise() -> None:
    blocks = {
        "layer1.0": BlockPolicy(recompute="full"),
        "layer2.0": BlockPolicy(host="all"),
        "layer3.0": BlockPolicy(recompute="selective", keep=(0,)),
    }
    found = verify(recipe("test_resnet"), plan(blocks=blocks, optimizer="host"), num_classes=3)
    assert found.holds
    assert found.num_differing == 0
    assert {kind.kind: kind.num_entries for kind in found.kinds} == {"weights": 47, "buffers": 45, "optimizer": 141}
    assert 0 < found.plan_peak_bytes < found.reference_peak_bytes
    assert "holds" in found.lines()[-1]


def test_a_plan_that_splits_the_norm_batch_is_caught() -> None:
    for claim in ("bitwise", "rounding"):
        found = verify(recipe("test_resnet"), plan(micro_batch=2, exactness=claim), num_classes=3, steps=1)
        assert not found.holds
        assert found.kinds[0].relative > 0.1
        assert "DOES NOT HOLD" in found.lines()[-1]
    assert verify(recipe("test_resnet"), plan(micro_batch=2, exactness="statistical"), num_classes=3, steps=1).holds


def test_a_split_without_batch_norm_is_rounding_and_not_bitwise() -> None:
    assert verify(recipe("test_vit"), plan(micro_batch=2, exactness="rounding"), num_classes=3, steps=2).holds
    assert not verify(recipe("test_vit"), plan(micro_batch=2, exactness="bitwise"), num_classes=3, steps=2).holds


def test_given_batches_are_used() -> None:
    batches = random_batches(recipe("test_resnet"), num_classes=3, steps=1)
    found = verify(recipe("test_resnet", norm_batch=2), plan(micro_batch=2), num_classes=3, batches=batches)
    assert found.steps == 1
    assert found.holds


def test_bits_tell_the_zeros_apart_and_know_a_nan() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert same_bits(nan, nan.clone())
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
