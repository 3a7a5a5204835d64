"""What is measured: a row, with its plan, for each device and budget; and why some cannot be."""

import torch

from lowmem.benchmarking.result import Row
from lowmem.errors import LowmemError
from lowmem.machine import Machine, choose_device
from lowmem.planning.devices import DeviceSpec, device_spec, settle_amp
from lowmem.planning.plan import Plan
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe
from lowmem.sizes import GIB, MIB, TIB, parse_size

CARD_BUDGETS = tuple(gib * GIB for gib in (24, 16, 8, 6, 4, 3, 2))
CPU_SHARES = (1.05, 0.8, 0.65, 0.5, 0.4)
"""Budgets on a CPU, as shares of what the step needs with nothing recomputed: there a budget stands in for a card."""


def devices_meant(text: str) -> list[torch.device]:
    """`all`: every card, or the CPU where there is none; otherwise a list such as `cuda:0,cpu`."""
    if text == "all":
        num_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [torch.device("cuda", index) for index in range(num_cards)] or [torch.device("cpu")]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise LowmemError("--devices: give all, or a list such as cuda:0,cpu.")
    return list(dict.fromkeys(choose_device(name) for name in names))


def budgets_meant(text: str | None) -> list[int] | None:
    """Bytes from "8G,4G,2G", largest first; None where no list is given."""
    if text is None:
        return None
    return sorted({parse_size(part) for part in text.split(",") if part.strip()}, reverse=True) or None


def rows_for(
    recipe: Recipe, device: torch.device, machine: Machine, budgets: list[int] | None, num_classes: int, num_images: int
) -> list[Row]:
    """The rows of one device, largest budget first, planned and ready to be measured, or refused with the reason."""
    spec = device_spec(device)
    name = machine.processor if device.type == "cpu" else spec.name
    recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, spec)})
    rows: list[Row] = []
    for budget_bytes in budgets or _default_budgets(recipe, spec, device, num_classes, num_images):
        row = Row(device=str(device), device_name=name, budget_bytes=budget_bytes)
        try:
            plan = make_plan(recipe, spec, str(device), budget_bytes, num_classes=num_classes, num_train=num_images)
        except LowmemError as error:
            rows.append(row.model_copy(update={"outcome": "refused", "reason": str(error)}))
            continue
        twin = _twin(plan, rows) if device.type == "cpu" else None
        rows.append(row.model_copy(update={"plan": plan, "same_as_bytes": twin}))
    return rows


def _default_budgets(
    recipe: Recipe, spec: DeviceSpec, device: torch.device, num_classes: int, num_images: int
) -> list[int]:
    if spec.kind == "cuda":
        return list(CARD_BUDGETS)
    whole = make_plan(recipe, spec, str(device), TIB, num_classes=num_classes, num_train=num_images)
    assert whole.prediction is not None
    return [max(1, round(share * whole.prediction.peak.total / MIB)) * MIB for share in CPU_SHARES]


def _twin(plan: Plan, rows: list[Row]) -> int | None:
    """The budget of an earlier row whose plan does the same; on a CPU that is all that a budget changes."""
    ours = _deeds(plan)
    return next(
        (row.budget_bytes for row in rows if row.plan and not row.same_as_bytes and _deeds(row.plan) == ours), None
    )


def _deeds(plan: Plan) -> dict[str, object]:
    return plan.model_dump(exclude={"budget", "prediction", "reasons", "eval_batch"})
