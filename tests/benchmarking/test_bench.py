"""A small bench on this machine's CPU, whole: the file, the page, the terminal, and what goes wrong."""

import time

import pytest
import torch
from rich.console import Console

from lowmem.benchmarking.cases import budgets_meant, devices_meant, rows_for
from lowmem.benchmarking.command import BenchRequest, run_bench
from lowmem.benchmarking.page import bench_page
from lowmem.benchmarking.result import Memory, Round, is_bench_file, load_bench
from lowmem.benchmarking.rounds import FreshProcesses, Visit, measure_in_turn
from lowmem.benchmarking.station import Work
from lowmem.benchmarking.statistics import is_stable, spread
from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.recipe import load_recipe
from lowmem.reporting import report_of
from lowmem.results.page import page_html
from lowmem.sizes import GIB, MIB
from lowmem.training.engine import OutOfBudgetError
from tests.browser import opened

TINY = ("model.name=test_resnet", "model.weights=none", "data.train_px=64", "batch.size=8", "mixup.prob=0.5")


@pytest.fixture(scope="module")
def bench_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    request = BenchRequest(budgets="1G,900M,1M", overrides=TINY, minutes=0, num_images=800, out=path)
    assert run_bench(request, Console(quiet=True)) == 0
    return path


def test_the_file_says_what_was_measured_and_why_the_rest_was_not(bench_path):
    bench = load_bench(bench_path)
    whole, same, refused = bench.rows
    assert bench.finished and bench.num_images == 800 and bench.machine.packages["torch"]
    assert whole.outcome == same.outcome == "measured" and same.same_as_bytes == GIB and same.rounds == whole.rounds
    assert refused.outcome == "refused" and "Use --vram" in refused.reason and not refused.rounds
    assert bench.epoch_s(whole) == pytest.approx(100 * whole.step_s.median)
    assert whole.memory.peak_bytes == pytest.approx(whole.plan.prediction.peak.total, rel=0.03)
    assert is_bench_file(bench_path) and not is_bench_file(bench_path.parent)


def test_a_browser_shows_the_page_on_a_phone(bench_path):
    with opened(report_of(bench_path), 390) as view:
        assert view.complaints == [] and view.requests == [] and view.overflow_px() == 0
        assert len(view.figures()) == 4 and all(box["inked"] > 10 for box in view.figures())


def test_the_page_names_machine_versions_and_counts(bench_path):
    page = page_html(bench_page(load_bench(bench_path)))
    for fact in (
        torch.__version__.partition("+")[0],
        this_machine().processor,
        "noise images",
        "does not fit",
        "100 classes",
    ):
        assert fact in page


def plan_rows():
    recipe = load_recipe("quickstart", TINY)
    return recipe, rows_for(recipe, torch.device("cpu"), this_machine(), [GIB, 30 * MIB], 10, 100)


class Visits:
    """A stand-in for the device: step times from a list, in the order of the visits."""

    def __init__(self, seconds, fails=False):
        self.seconds, self.fails, self.order = seconds, fails, []

    def visit(self, plan):
        self.order.append(plan.budget.total_bytes)
        if self.fails:
            raise OutOfBudgetError("no", rolled_back=True)
        return Visit(
            Round(num_steps=2, seconds=2 * self.seconds[len(self.order) % len(self.seconds)]), Memory(peak_bytes=5)
        )


def fresh(rows):
    return [row.model_copy(update={"same_as_bytes": None, "plan": rows[0].plan, "outcome": "pending"}) for row in rows]


def test_rows_take_turns_until_they_are_stable():
    _, rows = plan_rows()
    told = []
    device = Visits([0.1])
    done = measure_in_turn(fresh(rows), device, time.monotonic() + 60, lambda rows, number: told.append(number))
    assert [row.step_s.n for row in done] == [5, 5] and told == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    unsteady = measure_in_turn(fresh(rows), Visits([0.1, 0.3, 0.2]), time.monotonic() + 60, lambda *_: None)
    assert all(row.step_s.n == 25 and not row.is_stable for row in unsteady)


def test_every_row_gets_one_round_when_the_time_is_over():
    _, rows = plan_rows()
    done = measure_in_turn(fresh(rows), Visits([0.1]), time.monotonic() - 1, lambda *_: None)
    assert [row.step_s.n for row in done] == [1, 1]


def test_what_does_not_fit_after_all_is_said_and_not_tried_again():
    _, rows = plan_rows()
    device = Visits([0.1], fails=True)
    done = measure_in_turn(fresh(rows), device, time.monotonic() + 60, lambda *_: None)
    assert {row.outcome for row in done} == {"failed"} and len(device.order) == 2


def test_an_interrupted_bench_keeps_what_it_has(tmp_path, monkeypatch):
    class Interrupted(Visits):
        def visit(self, plan):
            if len(self.order) == 3:
                raise KeyboardInterrupt
            return super().visit(plan)

        def close(self):
            pass

    monkeypatch.setattr("lowmem.benchmarking.command.visitor_for", lambda *_: Interrupted([0.1]))
    path = tmp_path / "bench.json"
    assert run_bench(BenchRequest(budgets="1G", overrides=TINY, out=path), Console(quiet=True)) == 130
    bench = load_bench(path)
    assert not bench.finished and bench.rows[0].step_s.n == 3 and "interrupted" in path.with_suffix(".html").read_text()


def test_a_process_of_its_own_measures_the_same_work():
    recipe, rows = plan_rows()
    visit = FreshProcesses(Work(recipe, 10)).visit(rows[0].plan)
    assert visit.round.seconds > 0 and visit.memory.peak_bytes == pytest.approx(
        rows[0].plan.prediction.peak.total, rel=0.03
    )


def test_medians_and_what_is_known_of_them():
    assert spread([3.0]).n == 1 and spread([1, 2, 3, 4, 5]).median == 3 and spread([1, 2, 3, 4, 5]).low == 2
    assert is_stable([1.0, 1.001, 0.999, 1.0, 1.002]) and not is_stable([1.0] * 4) and not is_stable([1, 2, 1, 2, 1, 2])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"devices": "cuda:7"}, "torch sees"),
        ({"devices": ","}, "give all, or a list"),
        ({"budgets": "8X"}, "is not a size"),
        ({"out": "bench.txt"}, "must end in .json"),
        ({"out": "nowhere/bench.json"}, "there is no folder"),
        ({"data": "nowhere"}, "there is no such folder|nowhere"),
        ({"recipe": "nothing"}, "nothing"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(change, message, tmp_path):
    if "out" in change:
        change = {"out": tmp_path / change["out"]}
    with pytest.raises(LowmemError, match=message):
        run_bench(BenchRequest(**{"overrides": TINY, **change}), Console(quiet=True))


def test_a_file_that_is_there_is_not_overwritten(bench_path):
    before = bench_path.read_bytes()
    with pytest.raises(LowmemError, match="is there already"):
        run_bench(BenchRequest(overrides=TINY, out=bench_path), Console(quiet=True))
    assert bench_path.read_bytes() == before


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "no file of lowmem bench"),
        ('{"format": "lowmem bench 9"}', "lowmem bench 9"),
        ('{"format": "lowmem bench 1"}', "command"),
    ],
)
def test_a_file_that_is_no_bench_is_refused_with_the_reason(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(LowmemError, match=message):
        load_bench(path)


def test_lists_of_devices_and_budgets():
    assert devices_meant("cpu,cpu") == [torch.device("cpu")] and budgets_meant(None) is None
    assert budgets_meant("2G,8G, 2G") == [8 * GIB, 2 * GIB]
