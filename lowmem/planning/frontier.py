"""Time against memory: the plans of a recipe over many budgets, from the same traces."""

from dataclasses import dataclass

from lowmem.errors import LowmemError
from lowmem.planning.budget import budget_for
from lowmem.planning.devices import DeviceSpec
from lowmem.planning.known import Planning, with_budget
from lowmem.planning.plan import Budget, Plan
from lowmem.planning.planner import default_ram, plan_within
from lowmem.recipe import Recipe
from lowmem.sizes import format_size, short_size


@dataclass(frozen=True)
class FrontierRow:
    """One budget. Bytes and seconds are predictions; None where nothing fits."""

    budget_bytes: int
    tensor_bytes: int = 0
    peak_bytes: int = 0
    step_s: float | None = None
    baseline_step_s: float | None = None
    num_recomputed: int = 0
    num_offloaded: int = 0
    num_blocks: int = 0
    host_bytes: int = 0
    optimizer: str = ""
    exactness: str = ""

    def cells(self) -> tuple[str, ...]:
        if self.step_s is None or not self.baseline_step_s:
            return short_size(self.budget_bytes), "too small", "", "", "", "", "", ""
        return (
            short_size(self.budget_bytes),
            format_size(self.peak_bytes),
            f"{self.step_s:.3f}",
            f"{self.step_s / self.baseline_step_s - 1:+.1%}",
            f"{self.num_recomputed}/{self.num_blocks}",
            format_size(self.host_bytes) if self.host_bytes else "-",
            self.optimizer.replace("_", ", "),
            self.exactness,
        )


def frontier(
    recipe: Recipe,
    spec: DeviceSpec,
    device: str,
    budgets: list[int],
    *,
    num_classes: int,
    num_train: int,
    allow: str = "rounding",
) -> list[FrontierRow]:
    """A row for each budget, largest first. A plan that serves a smaller budget at less cost serves the larger one too."""
    planning: Planning | None = None
    rows: list[tuple[int, int, Plan | None]] = []
    for vram_bytes in sorted(budgets, reverse=True):
        fits = not rows or rows[-1][2] is not None
        try:
            budget = budget_for(spec, vram_bytes, device)
        except LowmemError:
            fits, budget = False, Budget(total_bytes=0)
        if fits and planning is None:
            planning = Planning(recipe, spec, device, budget, num_classes, num_train, default_ram(), allow)
        found = (
            _plan_or_none(with_budget(planning, spec, vram_bytes), budget.tensor_bytes) if planning and fits else None
        )
        rows.append((vram_bytes, budget.tensor_bytes, found))
    return [_row(vram, room, _cheapest(rows[number:])) for number, (vram, room, _) in enumerate(rows)]


def telling(rows: list[FrontierRow]) -> list[FrontierRow]:
    """Rows without those that say what the next one says: larger budgets that need nothing, smaller ones that nothing fits."""
    free = sum(row.step_s is not None and row.step_s == row.baseline_step_s for row in rows)
    fitting = sum(row.step_s is not None for row in rows)
    return rows[max(0, free - 1) : fitting + 1]


def _plan_or_none(planning: Planning, tensor_bytes: int) -> Plan | None:
    try:
        return plan_within(planning, tensor_bytes)
    except LowmemError:
        return None


def _cheapest(rows: list[tuple[int, int, Plan | None]]) -> Plan | None:
    """Of the plans for this budget and smaller ones, the quickest; of equals, the one for the largest budget."""
    plans = [plan for _, _, plan in rows if plan is not None]
    return min(plans, key=_step_s) if plans else None


def _step_s(plan: Plan) -> float:
    return plan.prediction.step_s if plan.prediction and plan.prediction.step_s else float("inf")


def _row(vram_bytes: int, tensor_bytes: int, plan: Plan | None) -> FrontierRow:
    if plan is None or plan.prediction is None:
        return FrontierRow(vram_bytes, tensor_bytes)
    return FrontierRow(
        vram_bytes,
        tensor_bytes,
        plan.prediction.peak.total,
        plan.prediction.step_s,
        plan.prediction.baseline_step_s,
        plan.num_recomputed,
        plan.num_offloaded,
        plan.num_blocks,
        plan.prediction.host_bytes,
        plan.optimizer,
        plan.exactness,
    )
