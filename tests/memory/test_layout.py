"""Regions in another layout: where they begin and end, what they change, and that policies inside them change nothing more."""

import pytest
import torch
from memory_helpers import (
    BLOCKS,
    differing,
    end_state,
    make_engine,
    make_plan,
    make_recipe,
    policies,
    relative_difference,
    run_steps,
    state_of,
)

from lowmem.errors import LowmemError
from lowmem.memory.layout import apply_layouts
from lowmem.verification import verify

MIXED = dict(zip(BLOCKS["test_resnet"], ("channels_last", "contiguous", "contiguous", "channels_last")))


def test_a_region_runs_in_its_layout_and_ends_with_it() -> None:
    engine, seen = make_engine(make_recipe("test_resnet"), make_plan(layouts=MIXED)), {}
    for path in MIXED:
        module = engine.model.get_submodule(f"{path}.conv2")
        module.register_forward_hook(lambda m, args, y, path=path: seen.update({path: y.is_contiguous()}))
    run_steps(engine, [0])
    assert seen == {path: name == "contiguous" for path, name in MIXED.items()}
    engine.adopt(make_plan())
    run_steps(engine, [1])
    assert not any(seen.values()), "another plan ends the region"
    engine.close()


def test_layouts_change_rounding_and_nothing_else() -> None:
    recipe = make_recipe("test_resnet")
    default, mixed = end_state(recipe, make_plan()), end_state(recipe, make_plan(layouts=MIXED))
    assert relative_difference(default, mixed) < 1e-3
    plan = make_plan(layouts=MIXED, exactness="rounding", optimizer="host", blocks=policies("test_resnet", "full"))
    assert verify(recipe, plan, 3, steps=2).holds


@pytest.mark.parametrize("kind", ["full", "dropped", "offload", "selective_offload"])
def test_under_the_same_layouts_policies_are_bitwise(kind: str) -> None:
    recipe = make_recipe("test_resnet", dropout=0.1)
    expected = end_state(recipe, make_plan(layouts=MIXED))
    assert not differing(expected, end_state(recipe, make_plan(layouts=MIXED, blocks=policies("test_resnet", kind))))


def test_a_checkpoint_has_no_layout() -> None:
    mixed, default = (
        make_engine(make_recipe("test_resnet"), make_plan(layouts=MIXED)),
        make_engine(make_recipe("test_resnet"), make_plan()),
    )
    run_steps(mixed, [0])
    default.load_tensors(mixed.model_tensors(), mixed.optimizer_tensors())
    assert not differing(state_of(mixed), state_of(default))


def test_a_block_of_another_model_is_refused() -> None:
    with pytest.raises(LowmemError, match="'layer9' that this model does not have"):
        apply_layouts(torch.nn.Sequential(), {"layer9": "contiguous"})
