"""The three measurements of a profile, each over its cases in turn until every figure is stable or its time is over (schedule.py).

A figure is stable when the median's 95 % interval is within 2 % of it, after at least five rounds (benchmarking/statistics.py); a round is a
second of steps. Rounds of one case lie apart in time, so what is alike between neighbouring steps does not feign certainty.
"""

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil

from lowmem.benchmarking.rounds import FreshProcesses, Visit
from lowmem.benchmarking.station import OutOfTimeError, Station, Work
from lowmem.benchmarking.statistics import is_stable
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.data.split import Split
from lowmem.errors import LowmemError
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.profiling.result import JointCase, LoaderCase, PlanCase
from lowmem.profiling.schedule import Cost, Turn, estimates, next_turn
from lowmem.recipe import Recipe
from lowmem.training.engine import OutOfBudgetError

MOST_ROUNDS = 25
ALONE_S = 0.5
Case = Any
"""A PlanCase or a JointCase."""
Told = Callable[[list[Any], int], None]
"""Hears of all cases, and of the one whose turn it is, before and after each visit."""


class Stations:
    """Stations that stay open on a CPU; a process for each visit on a card (see benchmarking/rounds.py). Nothing begins after `deadline`."""

    def __init__(self, work: Work, on_card: bool, deadline: float = math.inf) -> None:
        self.work, self.deadline = work, deadline
        self.fresh = FreshProcesses(work, deadline) if on_card else None
        self.open: dict[str, Station] = {}
        self.costs: dict[str, Cost] = {}

    def visit(self, plan: Plan) -> Visit:
        """One round. Raises OutOfTimeError where the deadline comes first."""
        key, started = plan.model_dump_json(), time.monotonic()
        if self.fresh is not None:
            visit = self.fresh.visit(plan)
            self.costs[key] = Cost(round_s=time.monotonic() - started)
            return visit
        if key not in self.open:
            self.open[key] = self._opened(plan)
        opened = time.monotonic()
        station = self.open[key]
        if self.work.split is not None:  # batches made during others' turns are no measure of the loader
            station.run_in(plan.loader.prefetch_batches + 1)
        visit = Visit(station.measure(), station.memory())
        open_s = self.costs[key].open_s if key in self.costs else opened - started
        self.costs[key] = Cost(open_s, time.monotonic() - opened)
        return visit

    def cost(self, plan: Plan) -> Cost | None:
        """As its last visit was; None before the first."""
        return self.costs.get(plan.model_dump_json())

    def close(self) -> None:
        for station in self.open.values():
            station.close()

    def _opened(self, plan: Plan) -> Station:
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        station = Station(self.work, plan, self.deadline)
        try:
            station.warm_up()
        except BaseException:
            station.close()
            raise
        return station


@dataclass(frozen=True)
class Limits:
    """Until when cases are measured, and the first of them, as times of `time.monotonic`; what a case is expected to cost."""

    until: float
    first_until: float
    expected: Cost | None = None


def measure_plans(cases: Sequence[PlanCase], stations: Stations, limits: Limits, told: Told) -> list[PlanCase]:
    def visited(case: PlanCase) -> PlanCase:
        visit = stations.visit(case.plan)
        step_s = visit.round.seconds / visit.round.num_steps
        return case.model_copy(
            update={"rounds_s": (*case.rounds_s, step_s), "peak_bytes": max(case.peak_bytes, visit.memory.peak_bytes)}
        )

    predicted = [case.plan.prediction.step_s if case.plan.prediction else None for case in cases]
    relative = [seconds / predicted[0] if seconds and predicted[0] else 1.0 for seconds in predicted]
    plans = [case.plan for case in cases]

    def costs() -> list[Cost]:
        return estimates(relative, [stations.cost(plan) for plan in plans], limits.expected)

    return _in_turn(list(cases), visited, costs, limits, told)


def measure_joint(cases: Sequence[JointCase], plan: Plan, stations: Stations, limits: Limits, told: Told) -> list[JointCase]:
    plans = {case.loader: plan.model_copy(update={"loader": case.loader}) for case in cases}

    def visited(case: JointCase) -> JointCase:
        found = stations.visit(plans[case.loader]).round
        return case.model_copy(
            update={
                "rounds_s": (*case.rounds_s, found.seconds / found.num_steps),
                "waits_frac": (*case.waits_frac, found.wait_data_s / found.seconds),
            }
        )

    def costs() -> list[Cost]:
        return estimates([1.0] * len(plans), [stations.cost(each) for each in plans.values()], limits.expected)

    return _in_turn(list(cases), visited, costs, limits, told)


def _in_turn(
    cases: list[Case], visited: Callable[[Case], Case], costs: Callable[[], list[Cost]], limits: Limits, told: Told
) -> list[Case]:
    while True:
        turns = [Turn(cost, len(case.rounds_s), _is_done(case)) for cost, case in zip(costs(), cases)]
        now = time.monotonic()
        index = next_turn(turns, limits.until - now, limits.first_until - now)
        if index is None:
            return cases
        told(list(cases), index)
        try:
            cases[index] = visited(cases[index])
        except OutOfTimeError:
            return cases
        except (OutOfBudgetError, LowmemError) as error:
            cases[index] = cases[index].model_copy(update={"failure": str(error).splitlines()[0]})
        told(list(cases), index)


def _is_done(case: Case) -> bool:
    return case.is_stable or len(case.rounds_s) >= MOST_ROUNDS


def measure_loader(split: Split, recipe: Recipe, loader: LoaderPlan, seconds: float, deadline: float) -> LoaderCase:
    """Workers alone, in a fresh process, so that neither memory nor time is anybody else's; no batch is waited for after `deadline`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_signals_to_the_parent) as process:
        return process.submit(_loader_alone, split, recipe, loader, seconds, deadline).result()


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader_alone(split: Split, recipe: Recipe, loader: LoaderPlan, seconds: float, deadline: float) -> LoaderCase:
    pixels = TrainPixels(split, recipe.augment, recipe.data.train_px, recipe.seed)
    before, _ = tree_bytes()
    most, rates, epoch = 0, [], 0
    ends = min(time.monotonic() + seconds, deadline)
    with Loader(split, pixels, recipe.data.train_px, recipe.batch.size, loader, recipe.seed) as opened:
        while not is_stable(rates) and (time.monotonic() < ends or (len(rates) < 2 and time.monotonic() < deadline)):
            epoch, started, num_images = epoch + 1, None, 0
            for number, batch in enumerate(opened.batches(epoch)):
                if number >= loader.prefetch_batches and started is not None:
                    num_images += len(batch.labels_B)
                if number == loader.prefetch_batches - 1:
                    started = time.perf_counter()
                if started and time.perf_counter() - started > ALONE_S and num_images:
                    rates.append(num_images / (time.perf_counter() - started))
                    started, num_images = time.perf_counter(), 0
                    most = max(most, tree_bytes()[0])
                    if is_stable(rates) or time.monotonic() > ends:
                        break
                if time.monotonic() > deadline:
                    break
            if started and num_images:
                rates.append(num_images / (time.perf_counter() - started))
                most = max(most, tree_bytes()[0])
    return LoaderCase(
        loader=loader, images_per_s=tuple(rates), extra_bytes=max(0, most - before), memory_kind=tree_bytes()[1]
    )


def tree_bytes() -> tuple[int, str]:
    """(bytes, pss or uss) of this process and its children: shared pages counted once, or not at all where the system cannot tell."""
    own = psutil.Process()
    total, kind = 0, "pss"
    for process in (own, *own.children(recursive=True)):
        try:
            facts = process.memory_full_info()
        except psutil.Error:
            continue
        kind = "pss" if hasattr(facts, "pss") else "uss"
        total += getattr(facts, kind)
    return total, kind
