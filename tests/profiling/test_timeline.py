"""The memory of a step: the allocator's history by hand, and a real step against the planner's trace."""

import pytest

from lowmem.planning.plan import BlockPolicy
from lowmem.profiling.memory import predicted_timeline
from lowmem.profiling.timeline import by_block_at_peak, curve, landmarks, measured_timeline, timeline_of_snapshot, until
from tests.memory.memory_helpers import NUM_CLASSES, make_plan, make_recipe


def test_an_allocators_history_by_hand() -> None:
    def entry(action: str, address: int, size: int, label: str = "") -> dict:
        return {"action": action, "addr": address, "size": size, "user_metadata": label}

    history = [
        entry("segment_alloc", 0, 10_000),
        entry("alloc", 1, 100, "copy"),
        entry("alloc", 2, 400, "forward:layer1.0"),
        entry("alloc", 3, 50, "backward:layer1.0"),
        entry("alloc", 4, 70, "backward:layer1.0"),
        entry("free_requested", 2, 400),
        entry("free_completed", 2, 400),
        entry("free_completed", 9, 1),  # of an allocation before the step
    ]
    timeline = timeline_of_snapshot(history, {"weights": 1000, "optimizer": 2000}, grads={4})
    assert curve(timeline) == [0, 1000, 3000, 3100, 3500, 3550, 3620, 3220]
    assert curve(timeline, "gradients")[-1] == 70 and curve(timeline, "workspace")[-1] == 50
    assert by_block_at_peak(timeline) == {"layer1.0": 400}
    assert landmarks(timeline) == [0, 3, 4, 5, 7]
    assert curve(until(timeline, 4)) == [0, 1000, 3000, 3100, 3500]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_predicted_timeline_is_the_measured_one(recompute: str, tmp_path) -> None:
    policy = {} if recompute == "none" else {f"layer{n}.0": BlockPolicy(recompute="full") for n in (1, 2)}
    recipe, plan = make_recipe("test_resnet"), make_plan(blocks=policy)
    measured = measured_timeline(recipe, plan, NUM_CLASSES, tmp_path / "snapshot")
    predicted = predicted_timeline(recipe, plan, NUM_CLASSES)
    assert max(curve(measured)) == pytest.approx(max(curve(predicted)), rel=0.01)
    for name in ("weights", "optimizer", "inputs", "gradients"):
        assert max(curve(measured, name)) == pytest.approx(max(curve(predicted, name)), rel=0.01)
    ends = [curve(timeline)[landmarks(timeline)[3] - 1] for timeline in (measured, predicted)]
    assert ends[0] == pytest.approx(ends[1], rel=0.02), "what the forward pass leaves"
    other = predicted_timeline(recipe, make_plan(blocks={"layer3.0": BlockPolicy(recompute="full")}), NUM_CLASSES)
    assert max(curve(measured, "activations")) != max(curve(other, "activations"))
