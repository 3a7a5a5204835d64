"""Where a run's time and memory went, as a section of its page."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowmem.results.charts import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION, panel
from lowmem.results.page import Drawing, Figures, Section, Table
from lowmem.results.run_profile import EpochProfile, RunProfile
from lowmem.sizes import format_size

GROUPS = (
    ("waiting for images", ("waiting",), ORANGE),
    ("copy to the device", ("copy",), INK),
    ("forward", ("forward",), BLUE),
    ("recomputation", ("recomputation",), PURPLE),
    ("backward", ("backward",), GREEN),
    ("optimizer", ("optimizer",), VERMILION),
    ("evaluation, saving and the rest", ("evaluation", "checkpoint", "step", "other"), GREY),
)
TABLE_PHASES = ("waiting", "copy", "forward", "recomputation", "backward", "optimizer", "evaluation", "checkpoint")


def profile_section(profile: RunProfile | None) -> Section:
    if profile is None or not profile.epochs:
        return Section("Where the time went")
    caption = f"Seconds of each epoch by what they went to, by {profile.timed_by}; nothing is counted twice."
    parts = [Figures(Drawing.of(split_figure(profile), caption)), _table(profile)]
    memory = _memory(profile.epochs[-1])
    return Section("Where the time went", *parts, *([memory] if memory else []))


def split_figure(profile: RunProfile) -> Figure:
    figure, ax = panel("Time by phase", height_in=3.6)
    epochs = [each.epoch for each in profile.epochs]
    bottom = [0.0] * len(epochs)
    for label, phases, colour in GROUPS:
        values = [sum(each.seconds.get(phase, 0.0) for phase in phases) for each in profile.epochs]
        if any(values):
            ax.bar(epochs, values, bottom=bottom, color=colour, label=label, width=0.8)
            bottom = [a + b for a, b in zip(bottom, values)]
    ax.set_xlabel("epoch")
    ax.set_ylabel("s")
    ax.set_ylim(0, 1.7 * max(bottom))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.legend(fontsize=8, ncols=2, loc="upper left")
    return figure


def _table(profile: RunProfile) -> Table:
    rows = [(str(each.epoch), *(f"{each.seconds.get(p, 0.0):.2f}" for p in TABLE_PHASES), *_step(each)) for each in profile.epochs]
    heads = ("epoch", *(f"{phase} s" for phase in TABLE_PHASES), "ms a step", "predicted", "images/s", "J an image")
    return Table(heads, rows, left=())


def _step(each: EpochProfile) -> tuple[str, str, str, str]:
    measured = "" if each.step is None else f"{1000 * each.step.median_s:.0f}"
    predicted = "" if each.step_s_pred is None else f"{1000 * each.step_s_pred:.0f} ({each.step_source})"
    joules = "" if each.energy_j is None else f"{each.energy_j / max(1, each.num_images):.2f}"
    return measured, predicted, f"{each.images_per_s:.0f}", joules


def _memory(last: EpochProfile) -> Table | None:
    if last.peak_meas is None:
        return None
    predicted = last.peak_pred.model_dump() if last.peak_pred else {}
    found = last.peak_meas.model_dump()
    rows = [
        (name, format_size(value), format_size(predicted[name]) if predicted else "")
        for name, value in found.items()
        if value or predicted.get(name)
    ]
    total = ("total", format_size(last.peak_meas.total), format_size(last.peak_pred.total) if last.peak_pred else "")
    note = "The peak of a training step by what it was for."
    return Table(("at the peak", "measured", "predicted"), [*rows, total], bold=(len(rows),), note=note)
