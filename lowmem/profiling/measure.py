"""The three measurements of a profile, each over all cases in turn until every figure is stable or its time is over.

A figure is stable when the median's 95 % interval is within 2 % of it, after at least five rounds (benchmarking/statistics.py); a round is a
second of steps. Rounds of one case lie apart in time, so what is alike between neighbouring steps does not feign certainty.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil

from lowmem.benchmarking.rounds import FreshProcesses, Visit
from lowmem.benchmarking.station import Station, Work
from lowmem.benchmarking.statistics import is_stable
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.data.split import Split
from lowmem.errors import LowmemError
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.profiling.result import JointCase, LoaderCase, PlanCase
from lowmem.recipe import Recipe
from lowmem.training.engine import OutOfBudgetError

MOST_ROUNDS = 25
ALONE_S = 0.5
Case = Any
"""A PlanCase or a JointCase."""


class Stations:
    """Stations that stay open on a CPU; a process for each visit on a card (see benchmarking/rounds.py)."""

    def __init__(self, work: Work, on_card: bool) -> None:
        self.work, self.fresh = work, FreshProcesses(work) if on_card else None
        self.open: dict[str, Station] = {}

    def visit(self, plan: Plan) -> Visit:
        if self.fresh is not None:
            return self.fresh.visit(plan)
        key = plan.model_dump_json()
        if key not in self.open:
            self.open[key] = Station(self.work, plan)
            self.open[key].warm_up()
        station = self.open[key]
        if (
            self.work.split is not None
        ):  # batches that became ready while others had their turn are no measure of the loader
            station.run_in(plan.loader.prefetch_batches + 1)
        return Visit(station.measure(), station.memory())

    def close(self) -> None:
        for station in self.open.values():
            station.close()


def measure_plans(
    cases: Sequence[PlanCase], stations: Stations, deadline: float, told: Callable[[list[PlanCase]], None]
) -> list[PlanCase]:
    def visited(case: PlanCase) -> PlanCase:
        visit = stations.visit(case.plan)
        step_s = visit.round.seconds / visit.round.num_steps
        return case.model_copy(
            update={"rounds_s": (*case.rounds_s, step_s), "peak_bytes": max(case.peak_bytes, visit.memory.peak_bytes)}
        )

    return _in_turn(list(cases), visited, deadline, told)


def measure_joint(
    cases: Sequence[JointCase],
    plan: Plan,
    stations: Stations,
    deadline: float,
    told: Callable[[list[JointCase]], None],
) -> list[JointCase]:
    def visited(case: JointCase) -> JointCase:
        found = stations.visit(plan.model_copy(update={"loader": case.loader})).round
        return case.model_copy(
            update={
                "rounds_s": (*case.rounds_s, found.seconds / found.num_steps),
                "waits_frac": (*case.waits_frac, found.wait_data_s / found.seconds),
            }
        )

    return _in_turn(list(cases), visited, deadline, told)


def _in_turn(
    cases: list[Case], visited: Callable[[Case], Case], deadline: float, told: Callable[[list[Case]], None]
) -> list[Case]:
    for number in range(MOST_ROUNDS):
        for index, case in enumerate(cases):
            if case.is_stable or (number > 0 and time.monotonic() > deadline):
                continue
            try:
                cases[index] = visited(case)
            except (OutOfBudgetError, LowmemError) as error:
                cases[index] = case.model_copy(update={"failure": str(error).splitlines()[0]})
            told(list(cases))
    return cases


def measure_loader(split: Split, recipe: Recipe, loader: LoaderPlan, seconds: float) -> LoaderCase:
    """Workers alone, in a fresh process, so that neither memory nor time is anybody else's."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_leave_signals_to_the_parent) as process:
        return process.submit(_loader_alone, split, recipe, loader, seconds).result()


def _leave_signals_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _loader_alone(split: Split, recipe: Recipe, loader: LoaderPlan, seconds: float) -> LoaderCase:
    pixels = TrainPixels(split, recipe.augment, recipe.data.train_px, recipe.seed)
    before, _ = tree_bytes()
    most, rates, epoch = 0, [], 0
    ends = time.monotonic() + seconds
    with Loader(split, pixels, recipe.data.train_px, recipe.batch.size, loader, recipe.seed) as opened:
        while not is_stable(rates) and (time.monotonic() < ends or len(rates) < 2):
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
