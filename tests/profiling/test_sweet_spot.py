"""The choice from figures set by hand."""

import pytest

from lowmem.planning.plan import LoaderPlan, MemoryBreakdown, Prediction
from lowmem.profiling.result import JointCase, PlanCase
from lowmem.profiling.sweet_spot import best_loader, best_plan, chosen_plan, sentences
from tests.memory.memory_helpers import make_plan


def plan_case(name: str, ms: float, mib: int, failure: str = "") -> PlanCase:
    plan = make_plan(prediction=Prediction(peak=MemoryBreakdown(activations=mib << 20)))
    rounds = () if failure else tuple(ms / 1000 * (1 + 0.001 * n) for n in (-2, -1, 0, 1, 2))
    return PlanCase(name=name, plan=plan, rounds_s=rounds, peak_bytes=mib << 20, failure=failure)


def joint_case(kind: str, workers: int, ms: float, wait: float, mib: int) -> JointCase:
    rounds = tuple(ms / 1000 * (1 + 0.001 * n) for n in (-2, -1, 0, 1, 2))
    loader = LoaderPlan(kind=kind, workers=workers)
    return JointCase(loader=loader, rounds_s=rounds, waits_frac=(wait,) * 5, extra_bytes=mib << 20)


def test_of_equally_quick_plans_the_one_with_the_least_memory() -> None:
    cases = [plan_case("roomy", 100, 900), plan_case("as quick", 101, 700), plan_case("slow", 130, 400)]
    best = best_plan(cases)
    assert best is not None and best.name == "as quick"
    told = " ".join(sentences(best, cases, None, []))
    assert "One lower (slow) would save 300 MiB and cost +28.7 % time" in told
    assert "One higher (roomy) would take 200 MiB more and bring -1.0 % time" in told


def test_plans_that_failed_are_not_chosen() -> None:
    cases = [plan_case("failed", 1, 1, failure="out of memory"), plan_case("fits", 100, 900)]
    assert best_plan(cases) == cases[1]
    assert best_plan(cases[:1]) is None


LOADERS = [
    joint_case("inline", 0, 130, 0.23, 5),
    joint_case("threads", 1, 104, 0.03, 20),
    joint_case("threads", 2, 100, 0.004, 30),
    joint_case("threads", 4, 100, 0.002, 60),
    joint_case("processes", 2, 99, 0.003, 120),
]


@pytest.mark.parametrize(
    ("on_card", "free_mib", "expected"),
    [(True, 1000, ("threads", 2)), (False, 1000, ("threads", 2)), (True, 25, ("threads", 1)), (True, 10, ("inline", 0))],
)
def test_the_least_memory_with_which_the_device_does_not_wait(on_card: bool, free_mib: int, expected: tuple) -> None:
    best = best_loader(LOADERS, on_card, free_mib << 20)
    assert best is not None and (best.loader.kind, best.loader.workers) == expected
    assert best_loader(LOADERS, on_card, 1 << 20) is None


def test_what_lies_on_either_side_is_told() -> None:
    case = plan_case("only", 90, 500)
    told = " ".join(sentences(case, [case], LOADERS[2], LOADERS))
    assert "One lower (1 thread): +4.0 % time, 3.0 % waiting, 10.0 MiB less host memory" in told
    assert "One higher (4 threads): +0.0 % time, 0.2 % waiting, 30.0 MiB more host memory" in told
    plan = chosen_plan(case, LOADERS[2], num_train=1000, batch_size=10)
    assert plan.loader.workers == 2 and plan.prediction.time_source == "profile"
    assert plan.prediction.epoch_s == pytest.approx(10.0)
