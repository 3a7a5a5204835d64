"""From a budget to a plan: it fits, it is what the trace says, it costs no more than a smaller budget's, and it says why."""

import pytest

from lowmem.errors import LowmemError
from lowmem.planning.budget import budget_for
from lowmem.planning.frontier import frontier, telling
from lowmem.planning.known import with_budget
from lowmem.planning.plan import Plan
from lowmem.planning.planner import leaner_plan, make_plan, plan_within
from lowmem.planning.trace import trace_evaluation, trace_step
from lowmem.recipe import Recipe
from lowmem.sizes import GIB, MIB
from tests.planning.conftest import CLASSES, planning_for, small_recipe


def planned(recipe: Recipe, spec, budget_bytes: int, **options: object) -> Plan:
    return make_plan(recipe, spec, "cpu", budget_bytes, num_classes=CLASSES, num_train=1000, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(cpu) -> Plan:
    return planned(small_recipe(), cpu, 64 * GIB)


def test_what_fits_is_left_alone(whole: Plan) -> None:
    assert not whole.blocks and whole.optimizer == "device" and whole.exactness == "bitwise"
    assert whole.prediction is not None and whole.prediction.step_s == whole.prediction.baseline_step_s
    assert "Everything fits" in whole.reasons[0]


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
def test_a_plan_fits_into_its_budget_as_a_whole(share: float, whole: Plan, cpu) -> None:
    recipe = small_recipe()
    budget = int(share * whole.prediction.peak.total)
    plan = planned(recipe, cpu, budget)
    again = trace_step(planning_for(recipe, cpu).network, plan, recipe).peak_bytes
    assert again == plan.prediction.peak.total <= budget
    assert plan.exactness == "bitwise" and plan.prediction.step_s >= whole.prediction.step_s
    assert plan.reasons[0].startswith("With nothing recomputed or moved")
    assert share > 0.8 or any("made again" in reason or "recomputes the rest" in reason for reason in plan.reasons)


def test_less_memory_never_costs_less_time_nor_more_memory(cpu) -> None:
    planning = planning_for(small_recipe(), cpu)
    peak = planning.trace(planning.base_plan(16)).peak_bytes
    rooms = [int(share * peak) for share in (0.6, 0.63, 0.66, 0.7, 0.74, 0.77, 0.8, 0.86, 0.9, 0.97, 1.0, 1.2)]
    found = [plan_within(with_budget(planning, cpu, room), room).prediction for room in rooms]
    assert all(a.step_s >= b.step_s for a, b in zip(found, found[1:]))
    assert all(a.peak.total <= b.peak.total for a, b in zip(found, found[1:]))
    assert all(item.peak.total <= room for item, room in zip(found, rooms))
    # Just below what the unconstrained step needs, moving the optimizer's state may free more than is asked for at almost no cost.
    used = [item.peak.total >= 0.92 * room for item, room in zip(found[:-2], rooms)]
    assert sum(used) >= 9
    assert all(enough or item.step_s < 1.001 * item.baseline_step_s for enough, item in zip(used, found))


def test_too_little_is_refused_with_a_budget_that_fits(cpu) -> None:
    recipe = small_recipe()
    with pytest.raises(LowmemError, match=r"--vram 20.0 MiB is too small for resnet26d at batch 16.*Use --vram (\d+)M") as refused:
        planned(recipe, cpu, 20 * MIB)
    named = int(str(refused.value).split("Use --vram ")[1].split("M")[0])
    assert planned(recipe, cpu, named * MIB).prediction.peak.total <= named * MIB
    with pytest.raises(LowmemError):
        planned(recipe, cpu, int(0.93 * named) * MIB)
    assert "data.train_px=96" in str(refused.value) and "batch.norm_batch=8" in str(refused.value)


def test_the_norm_batch_is_split_only_where_that_is_allowed(whole: Plan, cpu) -> None:
    recipe, budget = small_recipe(), int(0.42 * whole.prediction.peak.total)
    kept = planned(recipe, cpu, int(0.6 * whole.prediction.peak.total))
    assert kept.micro_batch == 16
    split = planned(recipe, cpu, budget, allow="statistical")
    assert split.micro_batch < 16 and split.exactness == "statistical"
    with pytest.raises(LowmemError, match="--allow statistical"):
        planned(recipe, cpu, budget)


def test_without_batch_norm_a_batch_may_be_split(cpu) -> None:
    recipe = small_recipe("vit_tiny_patch16_224", px=224)
    with pytest.raises(LowmemError, match="the leanest plan needs") as refused:
        planned(recipe, cpu, 80 * MIB, allow="bitwise")
    named = int(str(refused.value).split("Use --vram ")[1].split("M")[0])
    plan = planned(recipe, cpu, int(0.9 * named) * MIB)
    assert plan.micro_batch < 16 and plan.exactness == "rounding"


@pytest.mark.parametrize("changes", [{"amp": "fp16"}, {"optimizer": {"clip_norm": 1.0}}, {"batch": {"size": 16, "norm_batch": 8}}])
def test_the_optimizer_stays_out_of_the_backward_pass_where_it_must(changes: dict[str, object], laptop) -> None:
    recipe = small_recipe(**changes) if "batch" not in changes else Recipe.model_validate(small_recipe().model_dump() | changes)
    whole = planned(recipe, laptop, 8 * GIB)
    taken = budget_for(laptop, GIB, "cuda").total_bytes - budget_for(laptop, GIB, "cuda").tensor_bytes
    plan = planned(recipe, laptop, taken + int(0.95 * whole.prediction.peak.total))
    assert plan.optimizer in ("device", "host")


def test_a_leaner_plan_needs_less(whole: Plan, cpu) -> None:
    recipe = small_recipe()
    first = planned(recipe, cpu, int(0.8 * whole.prediction.peak.total))
    second = leaner_plan(first, recipe, num_classes=CLASSES, num_train=1000)
    assert second.prediction.peak.total < 0.95 * first.prediction.peak.total
    assert second.loader == first.loader and second.reasons[0].startswith("it keeps")


def test_evaluation_fits_beside_the_optimizer(whole: Plan, cpu) -> None:
    recipe = small_recipe()
    budget = int(0.6 * whole.prediction.peak.total)
    plan = planned(recipe, cpu, budget)
    network = planning_for(recipe, cpu).network
    assert 1 <= plan.eval_batch <= 128
    assert trace_evaluation(network, plan, recipe.data.test_px, plan.eval_batch) <= 1.05 * budget


def test_the_frontier_is_monotone_and_ends_with_a_refusal(cpu, whole: Plan) -> None:
    peak = whole.prediction.peak.total
    rows = frontier(small_recipe(), cpu, "cpu", [int(s * peak) for s in (2, 1.5, 1, 0.8, 0.6, 0.1, 0.05)], num_classes=CLASSES, num_train=1000)
    fitting = [row for row in rows if row.step_s is not None]
    assert [row.step_s for row in fitting] == sorted(row.step_s for row in fitting) and len(fitting) == 5
    shown = telling(rows)
    assert shown[0].step_s == shown[0].baseline_step_s and shown[-1].step_s is None and len(shown) == 4


def test_a_frontier_goes_on_below_what_a_card_needs_for_itself(laptop) -> None:
    budgets = [2 * GIB, 600 * MIB, 300 * MIB]
    rows = frontier(small_recipe(), laptop, "cuda", budgets, num_classes=CLASSES, num_train=1000)
    assert [row.step_s is None for row in rows] == [False, True, True]


def test_a_model_without_blocks_gets_a_peak(cpu) -> None:
    plan = planned(small_recipe("vgg11_bn", px=32, batch=2), cpu, 64 * GIB)
    assert plan.num_blocks == 0 and plan.prediction.peak.activations > 0


def test_other_words_for_allow_are_refused(cpu) -> None:
    with pytest.raises(LowmemError, match="--allow anything: give bitwise, rounding or statistical"):
        planned(small_recipe(), cpu, GIB, allow="anything")
