"""`lowmem profile --memory`: where the memory of one training step goes, measured, with the prediction drawn over it."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from lowmem.data.folder import embedded_images, num_classes_and_images
from lowmem.disk import replace_file, writing
from lowmem.machine import choose_device, this_machine
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.memory.meter import Timeline
from lowmem.planning.devices import device_spec, settle_amp
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import Plan
from lowmem.planning.planner import make_plan
from lowmem.planning.trace import trace_step
from lowmem.profiling.timeline import (
    alike,
    by_block_at_peak,
    curve,
    label_category,
    landmarks,
    measured_timeline,
    until,
)
from lowmem.recipe import Recipe, load_recipe
from lowmem.results.charts import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION, panel, png_bytes, svg_text
from lowmem.results.measured import measured_section
from lowmem.results.page import Drawing, Figures, Page, Section, Table, write_page
from lowmem.sizes import MIB, format_size, parse_size

COLOURS = {
    "weights": GREY,
    "ema": VERMILION,
    "optimizer": PURPLE,
    "gradients": GREEN,
    "inputs": ORANGE,
    "activations": BLUE,
    "workspace": INK,
}
"""In the order in which they are stacked."""
NUM_POINTS = 300
SPLIT = "covers the first and the last part of the split batch only: the parts between them are alike, and are not predicted one by one."


@dataclass(frozen=True)
class MemoryRequest:
    """The options of `lowmem profile --memory`."""

    recipe: str
    vram: str
    device: str
    out: Path
    data: Path | None = None
    """The images whose classes are counted; by default the embedded ones."""
    overrides: tuple[str, ...] = ()


def run_memory_profile(request: MemoryRequest, console: Console) -> int:
    """Measure one step and write memory.json, memory.svg, memory.png, memory.html, and on CUDA memory_snapshot.pickle."""
    prepare_allocator()
    recipe, device = load_recipe(request.recipe, request.overrides), choose_device(request.device)
    spec = device_spec(device)
    recipe = recipe.model_copy(update={"amp": settle_amp(recipe.amp, spec)})
    classes, images = num_classes_and_images(request.data or embedded_images(), recipe.data.val_fraction)
    plan = make_plan(
        recipe, spec, str(device), parse_size(request.vram), num_classes=classes, num_train=images, measure=True
    )
    say = console.print
    say(escape(f"One step of {recipe.model.name}, batch {recipe.batch.size}, on {spec.name}: measuring"), highlight=False)
    with writing(request.out, "the memory profile"):
        request.out.mkdir(parents=True, exist_ok=True)
        measured = measured_timeline(recipe, plan, classes, request.out / "memory_snapshot.pickle")
        say(f"{len(measured.allocations)} allocations measured; predicting", highlight=False)
        predicted = predicted_timeline(recipe, plan, classes)
        say("drawing", highlight=False)
        figure = timeline_figure(measured, predicted)
        (request.out / "memory.svg").write_text(svg_text(figure), encoding="utf-8")
        (request.out / "memory.png").write_bytes(png_bytes(figure))
        facts = memory_facts(recipe, plan, measured, predicted)
        replace_file(request.out / "memory.json", json.dumps(facts, indent=1) + "\n")
        page = write_page(memory_page(facts, figure), request.out / "memory.html")
    off = facts["measured"]["total"] / facts["predicted"]["total"] - 1
    told = f"Peak {format_size(facts['measured']['total'])} measured, {format_size(facts['predicted']['total'])} predicted ({off:+.2%})"
    console.print(escape(told), highlight=False)
    for name, value in facts["measured"].items():
        if name != "total" and value:
            console.print(f"  {name:<12} {format_size(value):>10}", highlight=False)
    console.print(escape(f"Figure and table: {page}"), highlight=False, soft_wrap=True)
    return 0


def predicted_timeline(recipe: Recipe, plan: Plan, num_classes: int) -> Timeline:
    trace = trace_step(FakeNetwork(recipe, num_classes), plan.model_copy(update={"device": "cpu"}), recipe)
    return until(trace.timeline, trace.num_timeline_events)


def memory_facts(recipe: Recipe, plan: Plan, measured: Timeline, predicted: Timeline) -> dict[str, Any]:
    return {
        "kind": "lowmem memory profile",
        "machine": this_machine().model_dump(mode="json"),
        "model": recipe.model.name,
        "batch": recipe.batch.size,
        "train_px": recipe.data.train_px,
        "device": plan.device_name,
        "num_passes": recipe.batch.num_atoms * -(-recipe.batch.atom // plan.micro_batch),
        "measured": _at_peak(measured),
        "predicted": _at_peak(predicted),
        "activations_by_block": by_block_at_peak(measured),
        "num_allocations": len(measured.allocations),
    }


def memory_page(facts: dict[str, Any], figure: Figure) -> Page:
    names = [name for name in (*COLOURS, "total") if facts["measured"].get(name) or facts["predicted"].get(name)]
    rows = [
        (name, format_size(facts["measured"].get(name, 0)), format_size(facts["predicted"].get(name, 0)))
        for name in names
    ]
    blocks = [
        (name or "outside of blocks", format_size(value)) for name, value in facts["activations_by_block"].items()
    ]
    caption = "Live tensors after each allocation and free of one step; the dashed line is the planner's trace, made without the device"
    caption += ". It " + SPLIT if facts["num_passes"] > 2 else "."
    return Page(
        title=f"Memory of one step of {facts['model']}",
        lead=f"Batch {facts['batch']} at {facts['train_px']} px on {facts['device']}: peak {format_size(facts['measured']['total'])} "
        f"measured, {format_size(facts['predicted']['total'])} predicted.",
        sections=(
            Section("Timeline", Figures(Drawing.of(figure, caption), wide=True)),
            Section("At the peak", Table(("for", "measured", "predicted"), rows, bold=(len(rows) - 1,))),
            Section("Activations at the peak, by block", *([Table(("block", "measured"), blocks)] if blocks else [])),
            measured_section(facts["machine"], (f"one step, {facts['num_allocations']} allocations",)),
        ),
    )


def timeline_figure(measured: Timeline, predicted: Timeline) -> Figure:
    """Measured bytes by category, stacked; the predicted total over them, stretched between the passes' beginnings."""
    figure, ax = panel("Memory of one training step", width_in=8.0, height_in=3.8)
    every = max(1, measured.clock // NUM_POINTS)
    marks = landmarks(measured)
    zero = marks[1] - 1
    times = list(range(zero, measured.clock + 1, every))
    series = {name: [curve_[t] / MIB for t in times] for name in COLOURS if any(curve_ := curve(measured, name))}
    ax.stackplot(
        [time - zero for time in times],
        series.values(),
        labels=series.keys(),
        colors=[COLOURS[name] for name in series],
        alpha=0.75,
    )
    total = curve(predicted)
    for number, (own, other) in enumerate(alike(predicted, measured)):
        points = [(_stretched(t, own, other) - zero, total[t] / MIB) for t in range(own[0], own[-1] + 1)]
        label = "" if number else "predicted"
        ax.plot(*zip(*points[:: max(1, len(points) // NUM_POINTS)]), "--", color=INK, linewidth=1.2, label=label)
    for name, mark in zip(("forward", "backward"), marks[2:4]):
        ax.axvline(mark - zero, color=INK, linewidth=0.8, linestyle=":")
        ax.annotate(f" {name}", (mark - zero, 0.97), xycoords=("data", "axes fraction"), fontsize=8, va="top")
    ax.set_xlabel("allocations and frees since the step began")
    ax.set_ylabel("MiB")
    ax.set_xlim(0, times[-1] - zero)
    ax.set_ylim(0, 1.12 * max(max(curve(measured)), max(total)) / MIB)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def _stretched(time: int, own: list[int], other: list[int]) -> float:
    for (a, b), (x, y) in zip(zip(own, own[1:]), zip(other, other[1:])):
        if time <= b:
            return x + (y - x) * (time - a) / max(1, b - a)
    return float(other[-1])


def _at_peak(timeline: Timeline) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for item in timeline.live_at(timeline.peak_time()):
        sums[label_category(item.label)] += item.num_bytes
    return dict(sums) | {"total": sum(sums.values())}
