"""What the bytes of a real step are for, against the sizes of the tensors and against the planner's trace."""

import pytest

from lowmem.memory.census import category
from lowmem.planning.network import FakeNetwork
from lowmem.planning.trace import trace_step
from tests.memory.memory_helpers import NUM_CLASSES, make_engine, make_plan, make_recipe, policies, run_steps


@pytest.mark.parametrize("kind", ["none", "full"])
def test_the_peak_of_a_step_by_category(kind: str) -> None:
    recipe, plan = make_recipe("test_resnet"), make_plan(blocks=policies("test_resnet", kind))
    engine = make_engine(recipe, plan)
    run_steps(engine, [0, 1])
    found = engine.enforcement.peak_breakdown
    assert found is not None and found.total == engine.enforcement.peak_bytes
    resident = {name: sum(t.untyped_storage().nbytes() for t in kind) for name, kind in engine.resident().items()}
    assert found.weights == resident["weights"] and found.optimizer == resident["optimizer"]
    assert found.inputs == 4 * 3 * 48 * 48 * 4, "the images in float32"
    predicted = trace_step(FakeNetwork(recipe, NUM_CLASSES), plan, recipe).breakdown
    assert found.total == pytest.approx(predicted.total, rel=0.02)
    assert found.activations + found.workspace == pytest.approx(predicted.activations + predicted.workspace, rel=0.03)


def test_recomputing_keeps_fewer_activations() -> None:
    peaks = {}
    for kind in ("none", "full"):
        engine = make_engine(make_recipe("test_resnet"), make_plan(blocks=policies("test_resnet", kind)))
        run_steps(engine, [0])
        peaks[kind] = engine.enforcement.peak_breakdown
    assert peaks["full"].activations < peaks["none"].activations


def test_labels_become_categories() -> None:
    assert [category(label) for label in ("weights", "copy", "forward", "recomputation", "backward", "gradients")] == [
        "weights", "inputs", "activations", "workspace", "workspace", "gradients"
    ]  # fmt: skip
