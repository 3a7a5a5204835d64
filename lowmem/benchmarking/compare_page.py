"""The page and the terminal's table of a comparison. What was measured is drawn full, what is predicted hollow and faint."""

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable

from lowmem.benchmarking.compare import Comparison, Entry
from lowmem.benchmarking.figures import memory_unit, time_unit
from lowmem.benchmarking.table import duration
from lowmem.results.charts import GREY, INK, SERIES, panel
from lowmem.results.measured import machine_lines
from lowmem.results.page import Cards, Drawing, Figures, Lines, Page, Section, Table, Text
from lowmem.sizes import GIB, format_size, short_size

MOST_TICKS = 7
FAR_APART = 20
"""Epoch times that differ by more than this factor are drawn on a logarithmic axis."""
HEADS = ("device", "budget", "epoch", "s/step", "middle half", "n", "images/s", "peak", "from")


def comparison_page(found: Comparison) -> Page:
    return Page(
        title=f"{found.recipe.model.name} across devices",
        lead=_lead(found),
        sections=(
            Section("At a glance", Cards(_cards(found))),
            Section("Figures", *_figures(found)),
            Section("Every device and budget", _table(found)),
            Section("How the predictions were made", *(Text(text) for text in calibration_lines(found))),
            *([Section("What does not fit, and why", _missing(found))] if found.missing else []),
            Section("How it was measured", *(Lines(lines) for lines in _machines(found))),
        ),
    )


def terminal_table(found: Comparison) -> TerminalTable:
    """For the terminal: predicted rows are dim."""
    table = TerminalTable(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for number, head in enumerate(("device", "budget", "epoch", "images/s", "peak", "from")):
        table.add_column(head, justify="left" if number in (0, 5) else "right", no_wrap=number > 0)
    for device in found.devices:
        for group in _alike(_of(found, device)):
            entry, cells = group[0], _cells(found, group)
            table.add_row(*cells[:3], cells[6], cells[7], "measured" if entry.measured else "predicted", style=None if entry.measured else "dim")  # fmt: skip
    return table


def calibration_lines(found: Comparison) -> list[str]:
    """How measured and predicted times agree, for each kind of device that is predicted or measured."""
    names = {"cuda": "Cards", "cpu": "CPUs"}
    kinds = [kind for kind in names if any(entry.kind == kind for entry in found.entries)]
    return [f"{names[kind]}: {found.calibrations[kind].in_words()}." for kind in kinds]


def _lead(found: Comparison) -> str:
    measured = [device for device in found.devices if _of(found, device)[0].measured]
    num_predicted = len(found.devices) - len(measured)
    return (
        f"An epoch of {found.num_images} images in batches of {found.recipe.batch.size} at {found.recipe.data.train_px} px, "
        f"training steps alone. Measured: {', '.join(measured)}."
        + (f" Predicted, not measured: {num_predicted} more." if num_predicted else "")
    )


def _cards(found: Comparison) -> list[tuple[str, str]]:
    measured = [entry for entry in found.entries if entry.measured]
    quickest = min(measured, key=lambda entry: entry.step_s)
    facts = [
        (f"quickest epoch that was measured ({quickest.device})", duration(found.epoch_s(quickest))),
        ("devices measured", str(len({entry.device for entry in measured}))),
        (
            "devices predicted",
            str(len({entry.device for entry in found.entries} - {entry.device for entry in measured})),
        ),
    ]
    calibration = found.calibrations["cuda"] if found.calibrations["cuda"].devices else found.calibrations["cpu"]
    if calibration.devices:
        facts.append(("measured over predicted time", f"{calibration.factor:.2f}"))
    return facts


def _figures(found: Comparison) -> list[Figures]:
    note = "Full: measured. Hollow: predicted, not measured."
    return [
        Figures(
            Drawing.of(_best(found), f"Epoch time of each device in the largest budget that it has. {note}"),
            Drawing.of(_by_budget(found), f"Epoch time by budget; both axes grow by factors. {note}"),
            Drawing.of(_against_memory(found), f"What memory costs: time over the device's own quickest. {note}"),
        )
    ]


def _best(found: Comparison) -> Figure:
    figure, ax = panel("Epoch time", height_in=max(2.4, 0.8 + 0.3 * len(found.devices)))
    best = [min(_of(found, device), key=lambda entry: entry.step_s) for device in found.devices]
    scale, unit = time_unit(max(found.epoch_s(entry) for entry in best))
    for place, entry in enumerate(best):
        colour = SERIES[0] if entry.measured else GREY
        value = found.epoch_s(entry)
        ax.barh(place, value / scale, color=colour if entry.measured else "none", edgecolor=colour, height=0.65)
        ax.text(
            value / scale, place, f" {duration(value)}", va="center", fontsize=9, color=INK if entry.measured else GREY
        )
    ax.set_yticks(range(len(best)), [_short(entry.device) for entry in best], fontsize=9)
    ax.invert_yaxis()
    values = [found.epoch_s(entry) / scale for entry in best]
    if max(values) > FAR_APART * min(values):
        ax.set_xscale("log")
        ax.set_xlim(min(values) / 2, 4 * max(values))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(0, 1.28 * max(values))
    ax.set_xlabel(unit)
    ax.grid(False, axis="y")
    return figure


def _by_budget(found: Comparison) -> Figure:
    figure, ax = panel("Epoch time by budget", height_in=4.6)
    scale, unit = time_unit(min(found.epoch_s(entry) for entry in found.entries))
    _lines(ax, found, lambda entry: (entry.budget_bytes / GIB, found.epoch_s(entry) / scale))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    budgets = sorted({entry.budget_bytes for entry in found.entries})
    ticks = _apart(budgets)
    ax.set_xticks([tick / GIB for tick in ticks], [short_size(tick) for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="budget", ylabel=unit)
    ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _against_memory(found: Comparison) -> Figure:
    figure, ax = panel("Time against memory", height_in=4.6)
    scale, unit = memory_unit(max(entry.peak_bytes for entry in found.entries))
    quickest = {device: min(entry.step_s for entry in _of(found, device)) for device in found.devices}
    _lines(ax, found, lambda entry: (entry.peak_bytes / scale, entry.step_s / quickest[entry.device]))
    ax.set(xlabel=f"peak of tensors, {unit}", ylabel="time, the device's quickest = 1")
    ax.set_xlim(left=0)
    ax.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return figure


def _lines(ax: Axes, found: Comparison, point: object) -> None:
    """A line for each device: measured ones in colours, predicted ones dashed in grey, with a mark of their own."""
    marks = "osD^vP*X<>hpd8"
    num_measured = 0
    for number, device in enumerate(found.devices):
        own = _of(found, device)
        points = [point(entry) for entry in own]  # type: ignore[operator]
        if own[0].measured:
            colour = SERIES[num_measured % len(SERIES)]
            num_measured += 1
            ax.plot(
                *zip(*points),
                f"{marks[number % len(marks)]}-",
                color=colour,
                markersize=5,
                label=_short(device),
                zorder=3,
            )
        else:
            ax.plot(*zip(*points), f"{marks[number % len(marks)]}:", color=GREY, markerfacecolor="none", markersize=5, linewidth=1, label=_short(device))  # fmt: skip


def _apart(budgets: Sequence[int]) -> list[int]:
    """Budgets far enough from each other that their names do not run together on a logarithmic axis."""
    step = (budgets[-1] / budgets[0]) ** (1 / MOST_TICKS)
    kept: list[int] = []
    for budget in budgets:
        if not kept or budget >= step * kept[-1]:
            kept.append(budget)
    return kept


def _table(found: Comparison) -> Table:
    groups = [group for device in found.devices for group in _alike(_of(found, device))]
    faint = [number for number, group in enumerate(groups) if not group[0].measured]
    note = "In italics: predicted, not measured."
    return Table(HEADS, [_cells(found, group) for group in groups], faint=faint, left=(0, 1, 8), note=note)


def _alike(own: list[Entry]) -> list[list[Entry]]:
    """A device's entries, with neighbouring budgets of the same predicted plan together."""
    return [
        list(group)
        for _, group in groupby(own, key=lambda entry: entry if entry.measured else (entry.step_s, entry.peak_bytes))
    ]


def _cells(found: Comparison, group: Sequence[Entry]) -> tuple[str, ...]:
    entry, budget = (
        group[0],
        " to ".join(dict.fromkeys(short_size(each.budget_bytes) for each in (group[0], group[-1]))),
    )
    half = f"{entry.low_s:.3f}-{entry.high_s:.3f}" if entry.low_s is not None and entry.high_s is not None else ""
    return (
        _short(entry.device), budget, duration(found.epoch_s(entry)), f"{entry.step_s:.3g}", half, str(entry.n or ""),
        f"{found.recipe.batch.size / entry.step_s:.0f}", format_size(entry.peak_bytes), entry.source,
    )  # fmt: skip


def _missing(found: Comparison) -> Table:
    rows = [(_short(device), short_size(budget), reason) for device, budget, reason in found.missing]
    return Table(("device", "budget", "reason"), rows, left=(0, 1, 2))


def _machines(found: Comparison) -> list[list[str]]:
    return [
        [
            f"{name}: {bench.command}",
            f"{bench.started}, data: {bench.data}, epoch of {bench.num_images} images",
            *machine_lines(bench.machine.model_dump()),
        ]
        for name, bench in found.benches
    ]


def _of(found: Comparison, device: str) -> list[Entry]:
    """A device's entries, largest budget first."""
    return sorted((entry for entry in found.entries if entry.device == device), key=lambda entry: -entry.budget_bytes)


def _short(device: str) -> str:
    """A name that fits into a figure."""
    for noise in ("(R)", "(TM)", "NVIDIA ", "GeForce ", " Processor", " CPU"):
        device = device.replace(noise, "")
    return device if len(device) <= 24 else f"{device[:23]}…"
