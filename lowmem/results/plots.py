"""The figures of a run: small panels, each as PNG and SVG in the run folder, and together in its report."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowmem.results.charts import BLUE, GREEN, GREY, INK, ORANGE, PAPER, VERMILION, panel, png_bytes, svg_text
from lowmem.results.history import EpochRow
from lowmem.sizes import GIB, MIB
from lowmem.training.evaluate import Evaluation

MAX_COUNTED_CLASSES, MAX_LABELLED_CLASSES = 15, 40


@dataclass(frozen=True)
class RunPanel:
    """One figure of a run; `wide` where it needs more than half of a page."""

    name: str
    figure: Figure
    caption: str
    wide: bool = False


def plot_run(
    history: list[EpochRow],
    evaluation: Evaluation,
    out_dir: Path,
    budget_bytes: int | None = None,
    predicted_bytes: int | None = None,
) -> list[Path]:
    """Draw every figure of a run; returns the files. `history` must not be empty."""
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = []
    for each in run_panels(history, evaluation, budget_bytes, predicted_bytes):
        paths += [out_dir / f"{each.name}.png", out_dir / f"{each.name}.svg"]
        paths[-2].write_bytes(png_bytes(each.figure))
        paths[-1].write_text(svg_text(each.figure), encoding="utf-8")
        each.figure.clear()
    return paths


def run_panels(
    history: list[EpochRow], evaluation: Evaluation | None, budget_bytes: int | None, predicted_bytes: int | None
) -> Iterator[RunPanel]:
    """The figures of a run that has finished an epoch, in the order of its report."""
    yield RunPanel("loss", _loss(history), "Loss by epoch; in training it counts augmentation and dropout.")
    yield RunPanel("validation", _validation(history), "Accuracy and macro F1 on the validation images.")
    if evaluation is not None:
        caption = f"{evaluation.num_images} validation images, best epoch; the stronger the colour, the larger the share of the true class."
        yield RunPanel("confusion", _confusion(evaluation), caption, wide=len(evaluation.classes) > 12)
    yield RunPanel("learning_rate", _learning_rate(history), "Learning rate at the end of each epoch.")
    yield RunPanel("seconds", _seconds(history), "Where the seconds of each epoch went.")
    yield RunPanel("memory", _memory(history, budget_bytes, predicted_bytes), "Most memory in use on the device.")


def _loss(history: list[EpochRow]) -> Figure:
    figure, ax = _epochs_panel("Loss", history)
    _line(ax, history, [row.train_loss for row in history], BLUE, "training")
    _line(ax, history, [row.val_loss for row in history], VERMILION, "validation")
    ax.legend()
    return figure


def _validation(history: list[EpochRow]) -> Figure:
    figure, ax = _epochs_panel("Validation", history)
    best = max(history, key=lambda row: (row.val_accuracy, -row.val_loss))
    _line(ax, history, [row.val_accuracy for row in history], VERMILION, "accuracy")
    _line(ax, history, [row.val_f1 for row in history], GREEN, "macro F1")
    label = f"best: {best.val_accuracy:.4f} in epoch {best.epoch}"
    ax.plot([best.epoch], [best.val_accuracy], "o", color=VERMILION, markersize=8, label=label)
    ax.legend()
    return figure


def _learning_rate(history: list[EpochRow]) -> Figure:
    figure, ax = _epochs_panel("Learning rate", history)
    rates = [row.lr for row in history]
    _line(ax, history, rates, BLUE, None)
    if min(rates) > 0 and max(rates) > 10 * min(rates):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    return figure


def _confusion(evaluation: Evaluation) -> Figure:
    counts_KK = np.array(evaluation.confusion, dtype=float)
    num = len(evaluation.classes)
    shares_KK = counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    side = min(11.0, max(4.6, 1.8 + 0.28 * num))
    figure, ax = panel(f"Predicted class: accuracy {evaluation.accuracy:.4f}", side, side * 0.95)
    ax.grid(False)
    rows, columns = np.nonzero(counts_KK)
    ax.add_collection(_cells(rows, columns, shares_KK[rows, columns]))
    ax.set(xlim=(-0.5, num - 0.5), ylim=(num - 0.5, -0.5), aspect="equal", ylabel="true class")
    if num <= MAX_LABELLED_CLASSES:
        ax.set_xticks(range(num), evaluation.classes, rotation=90 if num > 6 else 0, fontsize=9)
        ax.set_yticks(range(num), evaluation.classes, fontsize=9)
    else:
        ax.set_xlabel(f"class number (0 to {num - 1})")
    if num <= MAX_COUNTED_CLASSES:
        for row, column in zip(rows, columns):
            colour = PAPER if shares_KK[row, column] > 0.5 else INK
            ax.text(column, row, f"{counts_KK[row, column]:.0f}", ha="center", va="center", fontsize=9, color=colour)
    return figure


def _cells(rows: np.ndarray, columns: np.ndarray, shares: np.ndarray) -> PolyCollection:
    """A square for each count that is not 0, the more opaque the larger its share: a drawing that any background carries."""
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    squares = np.stack([columns, rows], 1)[:, None, :] + corners
    colours = [(*to_rgba(BLUE)[:3], share) for share in shares]
    return PolyCollection(list(squares), facecolors=colours, edgecolors="none")


def _seconds(history: list[EpochRow]) -> Figure:
    figure, ax = _epochs_panel("Seconds per epoch", history)
    bottom = np.zeros(len(history))
    parts = (
        ("training", [row.train_s - row.wait_data_s for row in history], BLUE),
        ("waiting for images", [row.wait_data_s for row in history], ORANGE),
        ("evaluation and saving", [row.eval_s for row in history], GREY),
    )
    for label, values, colour in parts:
        ax.bar([row.epoch for row in history], values, bottom=bottom, color=colour, label=label, width=0.8)
        bottom += np.array(values)
    ax.set_ylim(0, max(bottom.max() * 1.5, 1e-9))
    ax.legend(loc="upper right")
    return figure


def _memory(history: list[EpochRow], budget_bytes: int | None, predicted_bytes: int | None) -> Figure:
    figure, ax = _epochs_panel("Peak memory on the device", history)
    most = max([row.peak_bytes for row in history] + [predicted_bytes or 0])
    unit, name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    _line(ax, history, [row.peak_bytes / unit for row in history], BLUE, "measured")
    top = most
    if predicted_bytes:
        ax.axhline(predicted_bytes / unit, color=GREEN, linestyle="--", label="predicted")
    if budget_bytes and budget_bytes < 3 * most:
        ax.axhline(budget_bytes / unit, color=VERMILION, linestyle=":", label="budget")
        top = max(top, budget_bytes)
    ax.set_ylim(0, max(1e-9, 1.45 * top / unit))
    ax.set_ylabel(name)
    ax.legend(loc="upper right")
    return figure


def _epochs_panel(title: str, history: list[EpochRow]) -> tuple[Figure, Axes]:
    figure, ax = panel(title)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure, ax


def _line(ax: Axes, history: list[EpochRow], values: list[float], colour: str, label: str | None) -> None:
    finite = [value if math.isfinite(value) else math.nan for value in values]
    marker = "o" if len(history) <= 30 else None
    ax.plot([row.epoch for row in history], finite, color=colour, label=label, marker=marker, markersize=3.5)
