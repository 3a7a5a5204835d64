"""The figures of a bench."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowmem.benchmarking.result import BenchFile, Row
from lowmem.results.charts import GREY, SERIES, VERMILION, panel
from lowmem.sizes import GIB, MIB, short_size

SECOND, MINUTE, HOUR = 1, 60, 3600


def measured_rows(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.outcome == "measured" and row.rounds]


def time_unit(seconds: float) -> tuple[int, str]:
    """The unit in which a time of this size is drawn."""
    return (
        (HOUR, "hours") if seconds > 3 * HOUR else (MINUTE, "minutes") if seconds > 3 * MINUTE else (SECOND, "seconds")
    )


def memory_unit(num_bytes: float) -> tuple[int, str]:
    return (GIB, "GiB") if num_bytes >= GIB else (MIB, "MiB")


def epoch_times(bench: BenchFile, devices: Sequence[str]) -> Figure:
    figure, ax = panel("Epoch time")
    rows = measured_rows(bench.rows)
    scale, unit = time_unit(max(bench.epoch_s(row) for row in rows))
    budgets = sorted({row.budget_bytes for row in bench.rows}, reverse=True)
    width = 0.8 / len(devices)
    for number, device in enumerate(devices):
        own = [row for row in rows if row.device == device]
        x = [budgets.index(row.budget_bytes) + (number - (len(devices) - 1) / 2) * width for row in own]
        heights = [bench.epoch_s(row) / scale for row in own]
        spreads = [(bench.epoch_s(row) / scale / row.step_s.median, row.step_s) for row in own]
        errors = [[k * (s.median - s.low) for k, s in spreads], [k * (s.high - s.median) for k, s in spreads]]
        ax.bar(
            x,
            heights,
            width * 0.9,
            yerr=errors,
            color=SERIES[number % len(SERIES)],
            label=device,
            capsize=3,
            ecolor=GREY,
        )
    _mark_refused(ax, bench, budgets, devices, width)
    _budget_axis(ax, budgets)
    ax.set_ylabel(unit)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    if len(devices) > 1:
        ax.legend()
    return figure


def _mark_refused(ax: Axes, bench: BenchFile, budgets: list[int], devices: Sequence[str], width: float) -> None:
    """Where there is no bar, the reason in a word."""
    for row in bench.rows:
        if row.outcome in ("refused", "failed"):
            x = budgets.index(row.budget_bytes) + (devices.index(row.device) - (len(devices) - 1) / 2) * width
            text = " does not fit" if row.outcome == "refused" else " failed"
            ax.text(x, 0, text, rotation=90, ha="center", va="bottom", color=GREY)


def time_against_memory(bench: BenchFile, devices: Sequence[str]) -> Figure:
    figure, ax = panel("Time against memory")
    rows = measured_rows(bench.rows)
    scale, unit = memory_unit(max(row.memory.peak_bytes for row in rows))
    for number, device in enumerate(devices):
        own = sorted((row for row in rows if row.device == device), key=lambda row: row.memory.peak_bytes)
        if not own:
            continue
        name, colour = ("" if len(devices) == 1 else f"{device} "), SERIES[number % len(SERIES)]
        best_s = min(row.step_s.median for row in own)
        ratios = [row.step_s.median / best_s for row in own]
        errors = [[(row.step_s.median - row.step_s.low) / best_s for row in own], [(row.step_s.high - row.step_s.median) / best_s for row in own]]  # fmt: skip
        x = [row.memory.peak_bytes / scale for row in own]
        ax.errorbar(x, ratios, errors, fmt="o-", color=colour, markersize=5, capsize=3, label=f"{name}measured")
        predicted = [(p.peak.total / scale, p.step_s / p.baseline_step_s) for row in own if row.plan and (p := row.plan.prediction) and p.step_s and p.baseline_step_s]  # fmt: skip
        if predicted:
            ax.plot(
                *zip(*predicted), "s:", color=colour, markersize=5, markerfacecolor="none", label=f"{name}predicted"
            )
    ax.set(xlabel=f"peak of tensors, {unit}", ylabel="step time, quickest = 1")
    ax.set_xlim(left=0)
    ax.legend()
    return figure


def peaks(bench: BenchFile, devices: Sequence[str]) -> Figure:
    figure, ax = panel("Peak memory")
    rows = measured_rows(bench.rows)
    budgets = sorted({row.budget_bytes for row in rows}, reverse=True)
    most = max(max(row.memory.peak_bytes for row in rows), min(budgets))
    scale, unit = memory_unit(most)
    width = 0.8 / len(devices)
    for number, device in enumerate(devices):
        own = [row for row in rows if row.device == device]
        x = [budgets.index(row.budget_bytes) + (number - (len(devices) - 1) / 2) * width for row in own]
        colour = SERIES[number % len(SERIES)]
        ax.bar(
            x,
            [row.memory.peak_bytes / scale for row in own],
            width * 0.9,
            color=colour,
            label="measured" if len(devices) == 1 else device,
        )
        predicted = [
            (at, row.plan.prediction.peak.total / scale) for at, row in zip(x, own) if row.plan and row.plan.prediction
        ]
        if predicted:
            ax.plot(
                *zip(*predicted),
                "_",
                color=VERMILION,
                markersize=16,
                markeredgewidth=2,
                label="predicted" if number == 0 else None,
            )
    near = [(at, budget) for at, budget in enumerate(budgets) if budget <= 1.3 * most]
    if near:
        ax.hlines(
            [budget / scale for _, budget in near],
            [at - 0.45 for at, _ in near],
            [at + 0.45 for at, _ in near],
            color=GREY,
            linestyle=":",
            label="budget",
        )
    _budget_axis(ax, budgets)
    ax.set_ylabel(unit)
    ax.set_ylim(0, 1.45 * most / scale)
    ax.legend(ncols=3, loc="upper right")
    return figure


def times_by_round(rows: Sequence[Row]) -> Figure:
    figure, ax = panel("Step time by round")
    several = len({row.device for row in rows}) > 1
    own = [row for row in rows if not row.same_as_bytes]
    for number, row in enumerate(own):
        name = f"{row.device} {short_size(row.budget_bytes)}" if several else short_size(row.budget_bytes)
        times = [each.step_s for each in row.rounds]
        style = "-" if number < len(SERIES) else "--"
        ax.plot(
            range(1, len(times) + 1), times, f"o{style}", color=SERIES[number % len(SERIES)], markersize=3.5, label=name
        )
    ax.set(xlabel="round", ylabel="seconds")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_ylim(0, 1.45 * max(each.step_s for row in own for each in row.rounds))
    ax.legend(ncols=3, loc="upper right")
    return figure


def _budget_axis(ax: Axes, budgets: Sequence[int]) -> None:
    ax.set_xticks(range(len(budgets)), [short_size(budget) for budget in budgets])
    ax.set_xlim(-0.6, len(budgets) - 0.4)
    ax.set_xlabel("budget")
    ax.grid(False, axis="x")
