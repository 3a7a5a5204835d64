"""Rounds over all cases in turn, until every time is stable, the time is over or the user stops it.

The cases take turns, so that a drift of clock rates or a neighbour's work meets all of them alike. On a CPU the stations stay open side
by side. On a card they cannot: each would hold a context and weights that the others' budgets do not know. There each visit is a
process of its own, with a context, an allocator and convolution choices made under its own budget.
"""

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import psutil

from lowmem.benchmarking.result import Memory, Round, Row
from lowmem.benchmarking.station import Station, Work
from lowmem.errors import LowmemError
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.memory.limit import is_out_of_memory
from lowmem.planning.plan import Plan
from lowmem.training.engine import OutOfBudgetError

Result = TypeVar("Result")
MOST_ROUNDS = 25
SIDE_BY_SIDE_FRAC = 0.5
"""Share of the free host memory that stations which are open at once may take."""


@dataclass(frozen=True)
class Visit:
    """What one round brought."""

    round: Round
    memory: Memory


class Visitor(Protocol):
    """Takes a case's plan to a station and brings a round home; raises OutOfBudgetError where the plan does not fit."""

    def visit(self, plan: Plan) -> Visit: ...

    def close(self) -> None: ...


class OpenStations:
    """Stations that stay open between visits."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.stations: dict[str, Station] = {}

    def visit(self, plan: Plan) -> Visit:
        key = plan.model_dump_json()
        if key not in self.stations:
            self.stations[key] = Station(self.work, plan)
            self.stations[key].warm_up()
        station = self.stations[key]
        return Visit(station.measure(), station.memory())

    def close(self) -> None:
        for station in self.stations.values():
            station.close()


class FreshProcesses:
    """A new process for every visit; none takes a step after `deadline` (the processes of a machine share the monotonic clock)."""

    def __init__(self, work: Work, deadline: float = math.inf) -> None:
        self.work, self.deadline = work, deadline

    def visit(self, plan: Plan) -> Visit:
        return in_fresh_process(_visit_once, self.work, plan, self.deadline)

    def close(self) -> None:
        """Nothing is left open."""


def in_fresh_process(work: Callable[..., Result], *arguments: object) -> Result:
    """What a function of a module returns in a process of its own, which leaves no CUDA context behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


def visitor_for(work: Work, rows: list[Row]) -> Visitor:
    """Open stations where all of them fit beside each other into host memory, fresh processes elsewhere."""
    plans = [row.plan for row in rows if row.plan is not None]
    on_cpu = all(plan.device == "cpu" for plan in plans)
    peaks = sum(plan.prediction.peak.total + plan.prediction.host_bytes for plan in plans if plan.prediction)
    fits = peaks < SIDE_BY_SIDE_FRAC * psutil.virtual_memory().available
    return OpenStations(work) if on_cpu and fits else FreshProcesses(work)


def measure_in_turn(
    rows: list[Row], visitor: Visitor, deadline: float, told: Callable[[list[Row], int], None]
) -> list[Row]:
    """Rows with rounds. `deadline` is a time of `time.monotonic`; `told` hears of the rows after each visit.

    Every row gets one round, whatever the deadline; the rows that are done come back when the user stops it, through `told`.
    """
    rows = list(rows)
    for number in range(MOST_ROUNDS):
        for index, row in enumerate(rows):
            if _is_done(row) or (number > 0 and time.monotonic() > deadline):
                continue
            rows[index] = _visited(row, visitor)
            rows = [_shared(each, rows[index]) for each in rows]
            told(rows, number + 1)
    return rows


def _is_done(row: Row) -> bool:
    return (
        row.plan is None
        or row.same_as_bytes is not None
        or row.outcome in ("refused", "failed")
        or (row.outcome == "measured" and row.is_stable)
    )


def _shared(row: Row, measured: Row) -> Row:
    """A row with the rounds of the one whose plan it shares."""
    if row.device != measured.device or row.same_as_bytes != measured.budget_bytes:
        return row
    return row.model_copy(update={name: getattr(measured, name) for name in ("outcome", "reason", "rounds", "memory")})


def _visited(row: Row, visitor: Visitor) -> Row:
    assert row.plan is not None
    try:
        visit = visitor.visit(row.plan)
    except OutOfBudgetError as error:
        return row.model_copy(update={"outcome": "failed", "reason": f"ran out of memory: {error}"})
    except LowmemError as error:
        return row.model_copy(update={"outcome": "failed", "reason": str(error)})
    return row.with_round(visit.round, visit.memory)


def _visit_once(work: Work, plan: Plan, deadline: float) -> Visit:
    """In a process of its own: open, warm up, one round. Errors that do not pickle become ones that do."""
    prepare_allocator()
    try:
        with Station(work, plan, deadline) as station:
            station.warm_up()
            return Visit(station.measure(), station.memory())
    except OutOfBudgetError as error:
        raise LowmemError(f"ran out of memory: {error}") from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LowmemError(f"ran out of memory: {str(error).splitlines()[0]}") from None
