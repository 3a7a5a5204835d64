"""`lowmem plan` and `lowmem verify`: how a recipe will be trained in a budget, on a device that need not be here; time against memory
over budgets; and the proof that a plan changes nothing."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem.data.folder import embedded_images, num_classes_and_images, unlabelled_images
from lowmem.errors import LowmemError
from lowmem.machine import choose_device
from lowmem.planning.devices import DeviceSpec, device_by_name, device_spec, known_devices, settle_amp
from lowmem.planning.explain import plan_lines
from lowmem.planning.frontier import FrontierRow, frontier, telling
from lowmem.planning.host import Needs, needs_of, planned_within_ram
from lowmem.planning.loading import ASSUMED_IMAGE_S, loader_for
from lowmem.planning.plan import Plan, load_plan
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import GIB, MIB, parse_size, short_size
from lowmem.verification import verify

ASSUMED_CLASSES, ASSUMED_IMAGES = 100, 20_700
FRONTIER_GIB = (
    24,
    16,
    12,
    8,
    6,
    5,
    4,
    3.5,
    3,
    2.5,
    2,
    1.5,
    1.25,
    1,
    0.75,
    0.5,
    0.375,
    0.25,
    0.1875,
    0.125,
    0.09375,
    0.0625,
)


@dataclass(frozen=True)
class PlanRequest:
    """The options of `lowmem plan`."""

    recipe: str
    vram: str
    ram: str | None
    device: str
    data: Path | None
    overrides: tuple[str, ...]
    allow: str
    num_classes: int | None
    num_images: int | None
    measure: bool = False


def show_plan(request: PlanRequest, out: Path | None, console: Console) -> Plan:
    """Print the plan, and save it where `out` is given."""
    recipe, spec, device, classes, images = _settled(request)
    if request.measure and not spec.present:
        raise LowmemError(f"--measure: {spec.name} is not in this computer. Leave it out, or give --device auto.")

    def made(ram_bytes: int | None) -> Plan:
        plan = make_plan(
            recipe,
            spec,
            device,
            parse_size(request.vram),
            ram_bytes=ram_bytes,
            num_classes=classes,
            num_train=images,
            allow=request.allow,
            measure=request.measure,
            say=console.print,
        )
        if not spec.present and request.ram is None:
            return plan  # how many workers it takes is a question of the computer with the device
        loader, why = loader_for(plan, recipe, spec, ASSUMED_IMAGE_S)
        why = f"{why} What an image costs is assumed here; lowmem train times yours."
        return plan.model_copy(update={"loader": loader, "reasons": (*plan.reasons, why)})

    def needs(plan: Plan) -> Needs:
        return needs_of(plan, recipe, classes, None if request.data is None else unlabelled_images(request.data))

    plan = planned_within_ram(made, recipe, parse_size(request.ram), needs) if request.ram else made(None)
    for line in plan_lines(plan):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if out is not None:
        plan.save(out)
        console.print(f"Saved: {out}. Train with it: lowmem train --plan {out}", highlight=False)
    return plan


def show_frontier(request: PlanRequest, out: Path | None, console: Console) -> list[FrontierRow]:
    """Print time and memory over budgets; with `out`, also as JSON, PNG and SVG."""
    recipe, spec, device, classes, images = _settled(request)
    budgets = [int(gib * GIB) for gib in FRONTIER_GIB if spec.kind == "cpu" or gib * GIB <= 1.05 * spec.memory_bytes]
    rows = telling(frontier(recipe, spec, device, budgets, num_classes=classes, num_train=images, allow=request.allow))
    console.print(
        f"{recipe.model.name}, batch {recipe.batch.size}, {recipe.data.train_px} px on {spec.name} (predicted)",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for head in ("budget", "peak", "s/step", "overhead", "run again", "on host", "optimizer", "exactness"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "frontier.json").write_text(
            json.dumps([row.__dict__ for row in rows], indent=1) + "\n", encoding="utf-8"
        )
        _draw(rows, spec, recipe, out)
        console.print(f"Saved: {out / 'frontier.json'}, frontier.png, frontier.svg", highlight=False)
    return rows


def verify_plan(
    recipe_name: str,
    overrides: tuple[str, ...],
    vram: str,
    device: str,
    allow: str,
    steps: int,
    num_classes: int,
    plan_file: Path | None,
    console: Console,
) -> bool:
    """Train the plan beside the unconstrained run and print how their states compare; returns whether the claim holds."""
    recipe = load_recipe(recipe_name, overrides)
    chosen = choose_device(device)
    spec = device_spec(chosen)
    recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, spec)})
    plan = (
        load_plan(plan_file)
        if plan_file
        else make_plan(
            recipe, spec, str(chosen), parse_size(vram), num_classes=num_classes, num_train=ASSUMED_IMAGES, allow=allow
        )
    )
    for line in plan_lines(plan):
        console.print(escape(line), highlight=False, soft_wrap=True)
    comparison = verify(recipe, plan, num_classes, steps)
    for line in comparison.lines():
        console.print(escape(line), highlight=False, soft_wrap=True)
    return comparison.holds


def _settled(request: PlanRequest) -> tuple[Recipe, DeviceSpec, str, int, int]:
    """The recipe, the device and its torch name, and the numbers of classes and training images."""
    recipe = load_recipe(request.recipe, request.overrides)
    spec, device = _device(request.device)
    if request.data is not None or (request.recipe == "quickstart" and request.num_classes is None):
        classes, images = num_classes_and_images(request.data or embedded_images(), recipe.data.val_fraction)
    else:
        classes, images = ASSUMED_CLASSES, ASSUMED_IMAGES
    return recipe, spec, device, request.num_classes or classes, request.num_images or images


def _device(text: str) -> tuple[DeviceSpec, str]:
    """A device of this computer, or one from the table."""
    if text in ("auto", "cpu", "cuda") or text.startswith("cuda:"):
        device = choose_device(text)
        return device_spec(device), str(device)
    try:
        spec = device_by_name(text)
    except LowmemError:
        names = ", ".join(spec.name for spec in known_devices())
        raise LowmemError(f"--device {text!r}: give auto, cpu, cuda:N, or one of {names}.") from None
    return spec, "cpu" if spec.kind == "cpu" else "cuda:0" if torch.cuda.is_available() else "cuda"


def _draw(rows: list[FrontierRow], spec: DeviceSpec, recipe: Recipe, out: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    fitting = [row for row in rows if row.step_s is not None]
    unit, scale = ("GiB", GIB) if max((row.peak_bytes for row in fitting), default=0) >= GIB else ("MiB", MIB)
    budgets_at: dict[tuple[float, float], list[str]] = {}
    for row in fitting:
        budgets_at.setdefault((row.peak_bytes / scale, 1000 * row.step_s), []).append(short_size(row.budget_bytes))
    if budgets_at:
        ax.plot(*zip(*budgets_at), "o-", color="#0072B2")
    for point, budgets in budgets_at.items():
        ax.annotate(", ".join(budgets), point, textcoords="offset points", xytext=(6, 5), fontsize=8)
    ax.set_xlabel(f"predicted peak of tensors, {unit} (labels: the budget)")
    ax.set_ylabel("predicted ms per step")
    ax.set_ylim(0, 1150 * max((row.step_s for row in fitting), default=1.0))
    ax.margins(x=0.08)
    ax.set_title(
        f"{recipe.model.name}, batch {recipe.batch.size} at {recipe.data.train_px} px on {spec.name}", fontsize=11
    )
    ax.grid(True, alpha=0.25)
    for suffix in (".png", ".svg"):
        figure.savefig(out / f"frontier{suffix}", dpi=110)
