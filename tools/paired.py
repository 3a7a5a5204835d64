"""Scores of several arms over the same seeds: mean and spread, paired differences with their interval, and a figure of both."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy import stats

CONFIDENCE = 0.95
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Arm:
    """Scores in the order of the seeds."""

    name: str
    scores: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        spread = {"sd": stdev(self.scores)} if len(self.scores) > 1 else {}
        return {"mean": mean(self.scores), "lowest": min(self.scores), "highest": max(self.scores)} | spread


@dataclass(frozen=True)
class Comparison:
    """An arm less the first arm, seed by seed. `low` to `high` is the t interval of the mean difference, `p` the paired t-test's."""

    arm: str
    than: str
    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None

    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "one seed tells nothing about chance"
        if self.low <= 0 <= self.high:
            return "no difference shown"
        return "higher" if self.low > 0 else "lower"


def compared(arms: list[Arm]) -> list[Comparison]:
    """Every other arm against the first."""
    first, *others = arms
    return [_comparison(first, other) for other in others]


def print_comparison(question: str, metric: str, arms: list[Arm], console: Console) -> None:
    console.print(f"[bold]{question}[/]\nValidation {metric}, n = {len(arms[0].scores)} seeds", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD)
    for head in ("arm", "mean", "sd", "lowest", "highest"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm in arms:
        cells = arm.summary()
        table.add_row(
            arm.name, *(f"{cells[key]:.4f}" if key in cells else "-" for key in ("mean", "sd", "lowest", "highest"))
        )
    console.print(table)
    for item in compared(arms):
        console.print(in_words(item), soft_wrap=True)


def in_words(item: Comparison) -> str:
    text = f"{item.arm} less {item.than}, paired by seed: {item.difference:+.4f}"
    if item.low is not None and item.high is not None:
        p = "" if item.p is None else f", p = {item.p:.3f}" if item.p >= 0.001 else ", p < 0.001"
        text += f" ({CONFIDENCE:.0%} interval {item.low:+.4f} to {item.high:+.4f}{p}, n = {item.n})"
    return f"{text}: {item.verdict()}."


def draw(question: str, metric: str, arms: list[Arm], path: Path) -> None:
    """Left: each seed's scores, joined, with the means; right: the differences from the first arm, with their intervals."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(arms))
    for scores in zip(*(arm.scores for arm in arms)):
        left.plot(places, scores, "-", color="0.8", linewidth=1, zorder=1)
    for place, arm in zip(places, arms):
        colour = COLOURS[place % len(COLOURS)]
        left.scatter([place] * len(arm.scores), arm.scores, color=colour, alpha=0.6, s=30, zorder=2)
        left.hlines(mean(arm.scores), place - 0.2, place + 0.2, color=colour, linewidth=3, zorder=3)
    left.set_xticks(places, [arm.name for arm in arms])
    left.set_xlim(-0.5, len(arms) - 0.5)
    left.set_ylabel(f"validation {metric}")
    left.set_title(f"{len(arms[0].scores)} seeds (lines) and means (bars)", fontsize=10)
    _draw_differences(right, arms)
    figure.suptitle(question, fontsize=12)
    figure.savefig(path, dpi=110)


def _draw_differences(ax: object, arms: list[Arm]) -> None:
    items = compared(arms)
    ax.axvline(0, color="0.5", linewidth=1)
    for place, item in enumerate(items):
        colour = COLOURS[(place + 1) % len(COLOURS)]
        differences = [b - a for a, b in zip(arms[0].scores, arms[place + 1].scores)]
        ax.scatter(differences, [place] * len(differences), color=colour, alpha=0.4, s=25)
        low, high = (item.low, item.high) if item.low is not None else (item.difference, item.difference)
        ax.errorbar(
            item.difference,
            place,
            xerr=[[item.difference - low], [high - item.difference]],
            fmt="s",
            color=colour,
            capsize=5,
            linewidth=2,
        )
    ax.set_yticks(range(len(items)), [f"{item.arm}\nless {item.than}" for item in items])
    ax.set_ylim(len(items) - 0.5, -0.5)
    ax.set_title(f"differences, mean, {CONFIDENCE:.0%} interval", fontsize=10)
    ax.grid(True, axis="x", alpha=0.25)


def _comparison(first: Arm, other: Arm) -> Comparison:
    differences = [b - a for a, b in zip(first.scores, other.scores, strict=True)]
    n, difference = len(differences), mean(differences)
    if n < 2:
        return Comparison(other.name, first.name, n, difference, None, None, None)
    if stdev(differences) == 0:
        return Comparison(other.name, first.name, n, difference, difference, difference, None)
    test = stats.ttest_rel(other.scores, first.scores)
    low, high = test.confidence_interval(CONFIDENCE)
    return Comparison(other.name, first.name, n, difference, float(low), float(high), float(test.pvalue))
