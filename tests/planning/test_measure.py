"""Times of operations from the device that is here: what they are kept under, and that a plan's seconds come from them."""

import json
from pathlib import Path

import pytest
import torch

from lowmem.planning import measure
from lowmem.planning.cost import OpCost
from lowmem.planning.devices import device_spec
from lowmem.planning.known import usable_blocks
from lowmem.planning.measure import MeasuredTimes, OpTimer, load_times, measured_times, times_file
from lowmem.planning.options import block_signature
from lowmem.planning.planner import make_plan
from lowmem.planning.timing import Clock
from lowmem.sizes import MIB
from tests.planning.conftest import CLASSES, planning_for, small_recipe


@pytest.fixture(autouse=True)
def time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy computer measures every block, too."""
    monkeypatch.setattr(measure, "BUDGET_S", {"cpu": 1e9})


CONVOLUTION = OpCost("aten.convolution.default", 10**9, 10**6, "fp32")


def test_an_operation_is_found_by_kind_and_nearly_the_same_bytes() -> None:
    times = MeasuredTimes()
    times.add(CONVOLUTION, 2.0)
    assert times.find(OpCost("aten.convolution.default", 10**9, 1_010_000, "fp32")) == 2.0
    for other in (
        OpCost("aten.convolution.default", 10**9, 1_100_000, "fp32"),
        OpCost("aten.convolution.default", 10**9, 10**6, "bf16"),
        OpCost("aten.convolution.default", 10**9, 10**6, "fp32", groups=2),
        OpCost("aten.convolution.default", 10**8, 10**6, "fp32"),
    ):
        assert times.find(other) is None


def test_a_card_calls_some_operations_by_other_names() -> None:
    times = MeasuredTimes()
    times.add(OpCost("aten.cudnn_batch_norm.default", 0, 10**6, "bf16"), 1.0)
    times.add(OpCost("aten._scaled_dot_product_efficient_attention.default", 7, 10**6, "bf16"), 2.0)
    assert times.find(OpCost("aten.native_batch_norm.default", 0, 1_001_000, "bf16")) == 1.0
    assert times.find(OpCost("aten._scaled_dot_product_flash_attention_for_cpu.default", 7, 10**6, "bf16")) == 2.0


def test_what_was_not_measured_is_scaled_by_what_was(cpu) -> None:
    times, plain = MeasuredTimes(), Clock(cpu)
    times.add(CONVOLUTION, 3 * plain.op_seconds(CONVOLUTION))
    other = OpCost("aten.mul.Tensor", 0, 10**7, "fp32")
    clock = Clock(cpu, times)
    assert clock.op_seconds(other) == pytest.approx(3 * plain.op_seconds(other))
    assert clock.source([CONVOLUTION]) == "measured" and clock.source([other]) == plain.source([other]) == "roofline"


def blocks_of(planning) -> dict:
    trace = planning.trace(planning.base_plan(16))
    network = planning.network.blocks
    return {block_signature(network[p], trace.blocks[p]): (network[p], trace.blocks[p]) for p in usable_blocks(trace)}


def test_each_kind_of_block_is_measured_once_and_kept(tmp_path: Path, cpu) -> None:
    planning = planning_for(small_recipe(px=32), cpu)
    plan, path = planning.base_plan(16), tmp_path / "times.json"
    first = measured_times(blocks_of(planning), plan, torch.device("cpu"), path)
    ops = planning.trace(plan).ops
    known = sum(first.find(op) is not None for op in ops)
    assert known > 0.8 * len(ops) and len(first.blocks) == len(blocks_of(planning))
    content = path.read_text(encoding="utf-8")
    again = measured_times(blocks_of(planning), plan, torch.device("cpu"), path)
    assert path.read_text(encoding="utf-8") == content and again.kinds == load_times(path).kinds


def test_the_fake_network_is_left_as_it_was(tmp_path: Path, cpu) -> None:
    planning = planning_for(small_recipe(px=32), cpu)
    plan = planning.base_plan(16)
    before = planning.trace(plan).peak_bytes
    measured_times(blocks_of(planning), plan, torch.device("cpu"), tmp_path / "times.json")
    planning.traces.clear()
    assert planning.trace(plan).peak_bytes == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": [[1]], "blocks": []}', '{"rows": [], "blocks": 3}'])
def test_a_damaged_file_is_measured_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(text, encoding="utf-8")
    assert not load_times(path)


def test_every_operation_is_timed_and_none_is_changed() -> None:
    x = torch.randn(64, 64)
    with OpTimer(torch.device("cpu")) as timer:
        result = (x @ x).relu_().t()
    assert torch.equal(result, (x @ x).relu().t())
    assert [op.name.split(".")[1] for op, _ in timer.times()] == ["mm", "relu_"]
    assert all(seconds > 0 for _, seconds in timer.times())


def test_a_plan_for_the_device_that_is_here_uses_its_times() -> None:
    recipe, here = small_recipe(px=32), device_spec(torch.device("cpu"))
    path = times_file(torch.device("cpu"), "channels_last")
    path.unlink(missing_ok=True)

    def planned(budget_bytes: int, measure: bool):
        return make_plan(recipe, here, "cpu", budget_bytes, num_classes=CLASSES, num_train=100, measure=measure).prediction

    whole = planned(2**40, True)
    assert whole.time_source == "roofline" and not path.exists(), "nothing is measured where there is nothing to choose"
    assert planned(whole.peak.total - 8 * MIB, True).time_source == "measured"
    slow = json.loads(path.read_text(encoding="utf-8"))
    slow["rows"] = [[*row[:-1], 1.0] for row in slow["rows"]]
    path.write_text(json.dumps(slow), encoding="utf-8")
    assert planned(2**40, False).step_s > 20 * whole.step_s
    path.unlink()
