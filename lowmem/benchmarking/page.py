"""The page of a bench."""

from collections.abc import Sequence
from pathlib import Path

from lowmem.benchmarking.figures import epoch_times, measured_rows, peaks, time_against_memory, times_by_round
from lowmem.benchmarking.result import SYNTHETIC, BenchFile, Row, load_bench
from lowmem.benchmarking.statistics import MIN_ROUNDS, TARGET_FRAC
from lowmem.benchmarking.table import HEADS, duration, is_shown, row_cells
from lowmem.planning.explain import plan_lines
from lowmem.results.measured import measured_section
from lowmem.results.page import Cards, Drawing, Figures, Lines, Page, Part, Section, Table, write_page
from lowmem.sizes import format_size, short_size


def write_bench_report(path: Path) -> Path:
    """The page of a bench file, beside it."""
    return write_page(bench_page(load_bench(path)), path.with_suffix(".html"))


def bench_page(bench: BenchFile) -> Page:
    devices = list(dict.fromkeys(row.device for row in bench.rows))
    return Page(
        title=f"{bench.recipe.model.name}: time and memory by budget",
        lead=_lead(bench),
        sections=(
            Section("At a glance", *_cards(bench)),
            Section("Figures", *_figures(bench, devices)),
            Section("Every budget", _table(bench)),
            *(_refusals(bench)),
            Section("The plans in words", *(_plan(row) for row in bench.rows if row.plan and not row.same_as_bytes)),
            measured_section(bench.machine.model_dump(), _counts(bench)),
            Section("Recipe", Lines(_recipe_lines(bench), folded="every field")),
        ),
    )


def _lead(bench: BenchFile) -> str:
    rows = measured_rows(bench.rows)
    if not rows:
        return "Nothing was measured yet." if not bench.finished else "None of the budgets fits."
    state = "" if bench.finished else " The bench was interrupted; this is what it has."
    return (
        f"Batches of {bench.recipe.batch.size} at {bench.recipe.data.train_px} px on {', '.join(dict.fromkeys(row.device_name for row in rows))}; "
        f"an epoch is {bench.num_images} images of training, without validation. The classifier is the same in every budget.{state}"
    )


def _cards(bench: BenchFile) -> list[Part]:
    rows = measured_rows(bench.rows)
    if not rows:
        return []
    quickest, leanest = min(rows, key=lambda row: row.step_s.median), min(rows, key=lambda row: row.memory.peak_bytes)
    memory = leanest.memory.peak_bytes / max(1, quickest.memory.peak_bytes) - 1
    time = leanest.step_s.median / quickest.step_s.median - 1
    facts = [
        (
            f"images/s at best, {short_size(quickest.budget_bytes)}",
            f"{bench.recipe.batch.size / quickest.step_s.median:.1f}",
        ),
        ("an epoch at best", duration(bench.epoch_s(quickest))),
        ("peak there", format_size(quickest.memory.peak_bytes)),
        (f"memory in the smallest budget, {short_size(leanest.budget_bytes)}", f"{memory:+.0%}"),
        ("time there", f"{time:+.0%}"),
    ]
    return [Cards(facts)]


def _figures(bench: BenchFile, devices: Sequence[str]) -> list[Part]:
    rows = measured_rows(bench.rows)
    if not rows:
        return []
    counts = sorted({row.step_s.n for row in rows})
    on = f"{counts[0]}{f' to {counts[-1]}' if counts[1:] else ''} rounds of each budget"
    return [
        Figures(
            Drawing.of(
                epoch_times(bench, devices),
                f"Epoch of {bench.num_images} images by budget; bars: the middle half of {on}.",
            ),
            Drawing.of(
                time_against_memory(bench, devices),
                "What memory costs: measured step time over the quickest, and predicted.",
            ),
            Drawing.of(peaks(bench, devices), "Peak of tensors on the device: measured, predicted, and the budget."),
            Drawing.of(
                times_by_round(rows),
                "Step time in each round, in the order of the rounds: what drifts, drifts for all.",
            ),
        )
    ]


def _note() -> str:
    return (
        f"s/step: median over n rounds; * marks a median that is not known to {TARGET_FRAC:.0%} (its 95 % interval). Epoch: its training steps. "
        f"Predicted: the peak. Per pass: images of a micro-batch. Run again: blocks whose activations are recomputed."
    )


def _table(bench: BenchFile) -> Table:
    shown = [number for number, head in enumerate(HEADS) if is_shown(head, bench)]
    rows = [[cells[number] for number in shown] for cells in (row_cells(row, bench) for row in bench.rows)]
    words = [place for place, number in enumerate(shown) if HEADS[number] in ("device", "budget")]
    return Table([HEADS[number] for number in shown], rows, left=words, note=_note())


def _refusals(bench: BenchFile) -> list[Section]:
    refused = [
        (row.device, short_size(row.budget_bytes), row.reason)
        for row in bench.rows
        if row.outcome in ("refused", "failed")
    ]
    return (
        [Section("What does not fit, and why", Table(("device", "budget", "reason"), refused, left=(0, 1, 2)))]
        if refused
        else []
    )


def _plan(row: Row) -> Lines:
    assert row.plan is not None
    return Lines(plan_lines(row.plan), folded=f"{row.device}, {short_size(row.budget_bytes)}")


def _counts(bench: BenchFile) -> list[str]:
    data = (
        "noise images, made before the first step"
        if bench.data == SYNTHETIC
        else f"the training images of {bench.data}, loaded and augmented as in training"
    )
    steps = sorted({each.num_steps for row in bench.rows for each in row.rounds})
    many = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0]) if steps else "no"
    waiting = [row.wait_frac for row in measured_rows(bench.rows)]
    lines = [
        bench.command,
        f"{bench.started}, {many} steps a round, the budgets in turn; at least {MIN_ROUNDS} rounds, and until a median is known to {TARGET_FRAC:.0%} or the time is over",
        f"{data}; {bench.num_classes} classes; weights as initialised",
        f"{bench.torch_threads} torch threads" + (f", cuDNN {bench.cudnn}" if bench.cudnn else ""),
    ]
    if bench.data != SYNTHETIC and waiting:
        lines.append(
            f"waiting for images: {min(waiting):.1%} to {max(waiting):.1%} of the time, which is part of the step times"
        )
    return lines


def _recipe_lines(bench: BenchFile) -> list[str]:
    import tomli_w

    return [
        f"# {bench.recipe_name}",
        *tomli_w.dumps(bench.recipe.model_dump(mode="json", exclude_none=True)).splitlines(),
    ]
