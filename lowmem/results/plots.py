"""The figures of a run, as PNG and SVG, made with matplotlib's object API: no pyplot, no global figure state, nothing kept.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowmem.results.history import EpochRow
from lowmem.sizes import GIB, MIB
from lowmem.training.evaluate import Evaluation

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
WIDTH_IN, HEIGHT_IN, DPI = 9.0, 3.6, 110
MAX_COUNTED_CLASSES, MAX_LABELLED_CLASSES = 15, 40


def plot_run(
    history: list[EpochRow],
    evaluation: Evaluation,
    out_dir: Path,
    budget_bytes: int | None = None,
    predicted_bytes: int | None = None,
) -> list[Path]:
    """Draw every figure of a run; returns the files. `history` must not be empty."""
    out_dir.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": _curves(history),
        "learning_rate": _learning_rate(history),
        "confusion": _confusion(evaluation),
        "resources": _resources(history, budget_bytes, predicted_bytes),
    }
    return [path for name, figure in figures.items() for path in _saved(figure, out_dir / name)]


def _saved(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    figure.clear()
    return paths


def _figure(columns: int, width: float = WIDTH_IN, height: float = HEIGHT_IN) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _curves(history: list[EpochRow]) -> Figure:
    figure, (loss, accuracy) = _figure(2)
    epochs = [row.epoch for row in history]
    best = max(history, key=lambda row: (row.val_accuracy, -row.val_loss))
    _line(loss, epochs, [row.train_loss for row in history], BLUE, "training (with augmentation)")
    _line(loss, epochs, [row.val_loss for row in history], VERMILION, "validation")
    _line(accuracy, epochs, [row.val_accuracy for row in history], VERMILION, "accuracy")
    _line(accuracy, epochs, [row.val_f1 for row in history], GREEN, "macro F1")
    accuracy.plot(
        [best.epoch],
        [best.val_accuracy],
        "o",
        color=VERMILION,
        markersize=7,
        label=f"best: {best.val_accuracy:.4f} in epoch {best.epoch}",
    )
    for ax, title in ((loss, "Loss"), (accuracy, "Validation")):
        _epoch_axis(ax, title)
        ax.legend(frameon=False, fontsize=9)
    return figure


def _learning_rate(history: list[EpochRow]) -> Figure:
    figure, (ax,) = _figure(1)
    rates = [row.lr for row in history]
    _line(ax, [row.epoch for row in history], rates, BLUE, None)
    if min(rates) > 0 and max(rates) > 10 * min(rates):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    _epoch_axis(ax, "Learning rate at the end of each epoch")
    return figure


def _confusion(evaluation: Evaluation) -> Figure:
    counts_KK = np.array(evaluation.confusion, dtype=float)
    num = len(evaluation.classes)
    shares_KK = counts_KK / np.maximum(1, counts_KK.sum(1, keepdims=True))
    side = min(14.0, max(5.0, 2.2 + 0.32 * num))
    figure, (ax,) = _figure(1, side + 0.8, side)
    ax.grid(False)
    image = ax.imshow(shares_KK, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, shrink=0.8, label="share of the true class")
    if num <= MAX_LABELLED_CLASSES:
        ax.set_xticks(range(num), evaluation.classes, rotation=90 if num > 6 else 0, fontsize=9)
        ax.set_yticks(range(num), evaluation.classes, fontsize=9)
    else:
        ax.set_xlabel(f"class number (0 to {num - 1})")
    if num <= MAX_COUNTED_CLASSES:
        for row, column in zip(*np.nonzero(counts_KK)):
            ax.text(
                column,
                row,
                f"{counts_KK[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if shares_KK[row, column] > 0.5 else "black",
            )
    ax.set_ylabel("true")
    ax.set_title(f"Predicted class: accuracy {evaluation.accuracy:.4f} on {evaluation.num_images} images", fontsize=11)
    return figure


def _resources(history: list[EpochRow], budget_bytes: int | None, predicted_bytes: int | None) -> Figure:
    figure, (seconds, memory) = _figure(2)
    epochs = [row.epoch for row in history]
    bottom = np.zeros(len(history))
    parts = (
        ("training", [row.train_s - row.wait_data_s for row in history], BLUE),
        ("waiting for images", [row.wait_data_s for row in history], ORANGE),
        ("evaluation and saving", [row.eval_s for row in history], GREY),
    )
    for label, values, colour in parts:
        seconds.bar(epochs, values, bottom=bottom, color=colour, label=label, width=0.8)
        bottom += np.array(values)
    seconds.set_ylim(0, max(bottom.max() * 1.5, 1e-9))
    _memory(memory, history, budget_bytes, predicted_bytes)
    for ax, title in ((seconds, "Seconds per epoch"), (memory, "Peak memory on the device")):
        _epoch_axis(ax, title)
        ax.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _memory(ax: Axes, history: list[EpochRow], budget_bytes: int | None, predicted_bytes: int | None) -> None:
    most = max([row.peak_bytes for row in history] + [predicted_bytes or 0])
    unit, name = (GIB, "GiB") if most >= GIB else (MIB, "MiB")
    _line(ax, [row.epoch for row in history], [row.peak_bytes / unit for row in history], BLUE, "measured")
    top = most
    if predicted_bytes:
        ax.axhline(predicted_bytes / unit, color=GREEN, linestyle="--", label="predicted")
    if budget_bytes and budget_bytes < 3 * most:
        ax.axhline(budget_bytes / unit, color=VERMILION, linestyle=":", label="budget")
        top = max(top, budget_bytes)
    ax.set_ylim(0, max(1e-9, 1.35 * top / unit))
    ax.set_ylabel(name)


def _line(ax: Axes, x: list[int], y: list[float], colour: str, label: str | None) -> None:
    finite = [value if math.isfinite(value) else math.nan for value in y]
    ax.plot(x, finite, color=colour, label=label, linewidth=1.8, marker="o" if len(x) <= 30 else None, markersize=3.5)


def _epoch_axis(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
