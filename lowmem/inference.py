"""`lowmem predict` and `lowmem evaluate`: a trained classifier on new images, within a memory budget.

The batch starts at the largest that is useful and is halved whenever it does not fit; images and results stay in order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import labelled_images, unlabelled_images
from lowmem.data.loader import Loader
from lowmem.data.pixels import EvalPixels
from lowmem.data.readable import check_files
from lowmem.data.split import Split, packed_split
from lowmem.errors import LowmemError
from lowmem.machine import choose_device
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.memory.limit import enforce, is_out_of_memory, recover
from lowmem.planning.devices import device_spec, settle_amp
from lowmem.planning.plan import Budget, LoaderPlan, Plan
from lowmem.results.classifier import ClassifierInfo, load_classifier
from lowmem.results.predictions import Prediction, write_predictions
from lowmem.sizes import parse_size
from lowmem.training.evaluate import Evaluation, evaluate
from lowmem.training.step import autocast

LARGEST_BATCH = 128
Result = TypeVar("Result")


@dataclass(frozen=True)
class Classifier:
    """A model on its device and what it needs to know."""

    model: nn.Module
    info: ClassifierInfo
    plan: Plan
    device_input: DeviceInput
    watch: Callable[[str], AbstractContextManager[None]]


def open_classifier(path: Path, vram: str, device: str) -> Classifier:
    """A run's or a folder's classifier, ready within the budget; raises LowmemError."""
    prepare_allocator()
    chosen = choose_device(device)
    model, info = load_classifier(path)
    model = model.to(device=chosen, memory_format=torch.channels_last)
    plan = Plan(
        device=str(chosen),
        device_name=device_spec(chosen).name,
        amp_dtype=settle_amp("auto", device_spec(chosen)),
        micro_batch=1,
        eval_batch=LARGEST_BATCH,
        budget=Budget(total_bytes=parse_size(vram)),
        loader=LoaderPlan(pin_memory=chosen.type == "cuda"),
    )
    limit = enforce(chosen, plan.budget, lambda: {"weights": [*model.parameters(), *model.buffers()]})
    norm = Normalisation(info.mean, info.std)
    return Classifier(model, info, plan, DeviceInput(norm, chosen, plan.memory_format), limit.watch)


def predict_to_csv(
    paths: list[Path], out: Path, top: int, vram: str, device: str, flip: bool, px: int | None, console: Console
) -> None:
    """Label the images at the last path with the classifiers at the others, and write a CSV."""
    if len(paths) < 2:
        raise LowmemError("lowmem predict needs a run and images: lowmem predict RUN IMAGES --out predictions.csv.")
    split, unreadable = _readable(unlabelled_images(paths[-1]))
    totals_NK, classes = None, ()
    for path in paths[:-1]:
        classifier = open_classifier(path, vram, device)
        if totals_NK is not None and classifier.info.classes != classes:
            raise LowmemError(f"{path} has other classes than {paths[0]}: their probabilities cannot be averaged.")
        classes = classifier.info.classes
        probabilities_NK = probabilities(classifier, split, px or classifier.info.test_px, flip)
        totals_NK = probabilities_NK if totals_NK is None else totals_NK + probabilities_NK
    assert totals_NK is not None
    predictions = [
        Prediction(name, classes, row) for name, row in zip(split.names(), (totals_NK / (len(paths) - 1)).numpy())
    ]
    write_predictions(out, predictions, [name for name, _ in unreadable], min(top, len(classes)))
    for name, reason in unreadable:
        console.print(f"[yellow]unreadable, no label:[/] {name}: {reason}", highlight=False)
    console.print(f"{len(predictions)} images labelled: {out}", highlight=False)


def evaluate_folder(run: Path, data: Path, vram: str, device: str, px: int | None, console: Console) -> Evaluation:
    """Evaluate a classifier on a folder of class folders and print what comes out."""
    classifier = open_classifier(run, vram, device)
    split = labelled_images(data, classifier.info.classes)
    px = px or classifier.info.test_px

    def at(batch_size: int) -> Evaluation:
        with _loader(classifier, split, px, batch_size) as loader:
            return evaluate(
                classifier.model,
                loader.batches(),
                classifier.device_input,
                classifier.plan,
                classifier.info.classes,
                px,
            )

    evaluation = _fitting(classifier, at)
    _print_evaluation(evaluation, console)
    return evaluation


def probabilities(classifier: Classifier, split: Split, px: int, flip: bool = False) -> Tensor:
    """float32 [N, K] on the host, in the order of the split; `flip` averages with the mirrored image."""

    def at(batch_size: int) -> Tensor:
        with _loader(classifier, split, px, batch_size) as loader, torch.inference_mode():
            return torch.cat([_softmax(classifier, batch, flip).cpu() for batch in loader.batches()])

    return _fitting(classifier, at)


def _softmax(classifier: Classifier, batch: HostBatch, flip: bool) -> Tensor:
    images_BCHW = classifier.device_input.images(batch.images_BHWC)
    with autocast(classifier.plan):
        result_BK = classifier.model(images_BCHW).float().softmax(1)
        if flip:
            result_BK = (result_BK + classifier.model(images_BCHW.flip(3)).float().softmax(1)) / 2
    return result_BK


def _fitting(classifier: Classifier, at: Callable[[int], Result]) -> Result:
    """The result with the largest batch that fits."""
    batch_size = LARGEST_BATCH
    while True:
        result = _try(classifier, at, batch_size)
        if result is not None:
            return result
        recover()
        if batch_size == 1:
            raise LowmemError("Not even one image fits into --vram. Give more memory.")
        batch_size //= 2


def _try(classifier: Classifier, at: Callable[[int], Result], batch_size: int) -> Result | None:
    try:
        with classifier.watch(f"batch {batch_size}"):
            return at(batch_size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def _loader(classifier: Classifier, split: Split, px: int, batch_size: int) -> Loader:
    return Loader(split, EvalPixels(split, px, classifier.info.crop_frac), px, batch_size, classifier.plan.loader)


def _readable(split: Split) -> tuple[Split, list[tuple[str, str]]]:
    """The split without its unreadable images, and those with their reasons."""
    names = list(split.names())
    reasons = check_files(split.root, names).reasons
    good = [index for index, name in enumerate(names) if name not in reasons]
    if not good:
        raise LowmemError(f"{split.root}: none of the {len(names)} images can be read.")
    kept = packed_split(split.root, (names[index] for index in good), split.labels[good])
    return kept, sorted(reasons.items())


def _print_evaluation(evaluation: Evaluation, console: Console) -> None:
    table = Table(title=f"{evaluation.num_images} images at {evaluation.px} px", show_header=False)
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
