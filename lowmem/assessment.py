"""`lowmem evaluate`: a classifier on labelled images, at one size or several, and the choice among them."""

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowmem.data.folder import labelled_images
from lowmem.errors import LowmemError
from lowmem.inference import evaluated, open_classifier
from lowmem.results.classifier import set_test_px
from lowmem.training.evaluate import Evaluation

SMALLEST_PX, LARGEST_PX = 16, 4096


@dataclass(frozen=True)
class EvaluateRequest:
    """The options of `lowmem evaluate`."""

    run: Path
    data: Path
    vram: str = "8G"
    device: str = "auto"
    px: str | None = None
    flip: bool = False
    choose: bool = False


def evaluate_folder(request: EvaluateRequest, console: Console) -> list[Evaluation]:
    """Evaluate a classifier on a folder of class folders and print what comes out; with `choose`, the best size becomes the
    classifier's own."""
    sizes = parse_sizes(request.px) if request.px else ()
    if request.choose and len(sizes) < 2:
        raise LowmemError("--choose takes the best of several sizes: add --px, as in --px 224,288,320.")
    classifier = open_classifier(request.run, request.vram, request.device)
    split = labelled_images(request.data, classifier.info.classes)
    found = [evaluated(classifier, split, px, request.flip) for px in sizes or (classifier.info.test_px,)]
    best = best_of(found)
    if len(found) > 1:
        _print_sizes(found, best, console)
    _print_evaluation(best, request.flip, console)
    if request.choose:
        set_test_px(request.run, best.px)
        console.print(
            f"{best.px} px is now the test size of {request.run}: predict, evaluate and timm use it.", highlight=False
        )
    elif len(found) > 1:
        console.print(f"Add --choose to make {best.px} px the classifier's test size; do so on validation images only.")
    return found


def parse_sizes(text: str) -> tuple[int, ...]:
    """Sizes in pixels from "224" or "224,288,320"; raises LowmemError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and SMALLEST_PX <= int(part) <= LARGEST_PX for part in parts):
        raise LowmemError(f"--px {text}: give sizes from {SMALLEST_PX} to {LARGEST_PX}, as in 224 or 224,288,320.")
    return tuple(dict.fromkeys(int(part) for part in parts))


def best_of(evaluations: list[Evaluation]) -> Evaluation:
    """The highest accuracy; of equal ones the lowest loss, then the smallest size."""
    return min(evaluations, key=lambda item: (-item.accuracy, item.loss, item.px))


def _print_sizes(evaluations: list[Evaluation], best: Evaluation, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD)
    for head in ("px", "accuracy", "top-5", "precision", "recall", "F1", "loss", ""):
        table.add_column(head, justify="right")
    for item in evaluations:
        figures = (item.accuracy, item.top5, item.precision, item.recall, item.f1, item.loss)
        table.add_row(str(item.px), *(f"{figure:.4f}" for figure in figures), "best" if item is best else "")
    console.print(table)


def _print_evaluation(evaluation: Evaluation, flip: bool, console: Console) -> None:
    mirrored = ", averaged with their mirror images" if flip else ""
    console.print(f"{evaluation.num_images} images at {evaluation.px} px{mirrored}:", highlight=False)
    table = Table(show_header=False)
    rows = (
        ("accuracy", evaluation.accuracy),
        ("top-5 accuracy", evaluation.top5),
        ("macro precision", evaluation.precision),
        ("macro recall", evaluation.recall),
        ("macro F1", evaluation.f1),
        ("loss", evaluation.loss),
    )
    for name, value in rows:
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    confused = sorted(
        (
            (count, truth, guess)
            for truth, row in enumerate(evaluation.confusion)
            for guess, count in enumerate(row)
            if truth != guess and count
        ),
        reverse=True,
    )[:5]
    for count, truth, guess in confused:
        console.print(f"  {count} x {evaluation.classes[truth]} taken for {evaluation.classes[guess]}", highlight=False)
