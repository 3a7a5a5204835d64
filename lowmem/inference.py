"""`lowmem predict`, and what it shares with `lowmem evaluate`: a trained classifier on new images, within a memory budget.

The batch starts at the largest that is useful and is halved whenever it does not fit; images and results stay in order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput, Normalisation
from lowmem.data.folder import unlabelled_images
from lowmem.data.loader import Loader
from lowmem.data.pixels import EvalPixels
from lowmem.data.readable import check_files
from lowmem.data.shrunk import ShrunkEachTime
from lowmem.data.split import Split, packed_split
from lowmem.errors import LowmemError
from lowmem.machine import choose_device
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.memory.limit import enforce, is_out_of_memory, recover
from lowmem.planning.devices import device_spec, settle_amp
from lowmem.planning.plan import Budget, LoaderPlan, Plan
from lowmem.results.classifier import ClassifierInfo, load_classifier
from lowmem.results.predictions import Prediction, write_predictions, zip_predictions
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


@dataclass(frozen=True)
class PredictRequest:
    """The options of `lowmem predict`."""

    paths: list[Path]
    out: Path
    top: int = 1
    vram: str = "8G"
    device: str = "auto"
    flip: bool = False
    px: int | None = None
    zip: bool = False


def predict_to_csv(request: PredictRequest, console: Console) -> None:
    """Label the images at the last path with the classifiers at the others, whose probabilities are averaged, and write a CSV."""
    *runs, images = request.paths
    if not runs:
        raise LowmemError("lowmem predict needs a run and images: lowmem predict RUN IMAGES --out predictions.csv.")
    split, unreadable = _readable(unlabelled_images(images))
    totals_NK, classes = None, ()
    for path in runs:
        classifier = open_classifier(path, request.vram, request.device)
        if totals_NK is not None:
            _refuse_other_classes(runs[0], classes, path, classifier.info.classes)
        classes = classifier.info.classes
        px = request.px or classifier.info.test_px
        probabilities_NK = probabilities(classifier, split, px, request.flip)
        totals_NK = probabilities_NK if totals_NK is None else totals_NK + probabilities_NK
    assert totals_NK is not None
    predictions = [Prediction(name, classes, row) for name, row in zip(split.names(), (totals_NK / len(runs)).numpy())]
    write_predictions(request.out, predictions, [name for name, _ in unreadable], min(request.top, len(classes)))
    for name, reason in unreadable:
        console.print(f"[yellow]unreadable, no label:[/] {name}: {reason}", highlight=False)
    zipped = f", zipped: {zip_predictions(request.out)}" if request.zip else ""
    console.print(f"{len(predictions)} images labelled: {request.out}{zipped}", highlight=False)


def _refuse_other_classes(first: Path, classes: tuple[str, ...], path: Path, others: tuple[str, ...]) -> None:
    """Raises LowmemError naming the first class in which two classifiers part."""
    if others == classes:
        return
    if set(others) == set(classes):
        place = next(index for index, (a, b) in enumerate(zip(classes, others)) if a != b)
        how = (
            f"the same classes in another order (class {place} is {others[place]!r} there and {classes[place]!r} here)"
        )
    else:
        odd = sorted(set(classes) ^ set(others))
        how = f"other classes ({len(others)} and {len(classes)}; only one has {odd[0]!r})"
    raise LowmemError(
        f"{path} and {first} have {how}: their probabilities cannot be averaged. Train both on one data folder."
    )


class Mirrored(nn.Module):
    """A classifier whose probabilities are averaged over an image and its mirror image; gives their logarithms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        both = (self.model(images_BCHW), self.model(images_BCHW.flip(3)))
        return (sum(logits_BK.float().softmax(1) for logits_BK in both) / 2).log()


def evaluated(classifier: Classifier, split: Split, px: int, flip: bool = False) -> Evaluation:
    """The classifier's figures on labelled images at one size."""
    model = Mirrored(classifier.model) if flip else classifier.model

    def at(batch_size: int) -> Evaluation:
        with _loader(classifier, split, px, batch_size) as loader:
            return evaluate(
                model, loader.batches(), classifier.device_input, classifier.plan, classifier.info.classes, px
            )

    return _fitting(classifier, at)


def probabilities(classifier: Classifier, split: Split, px: int, flip: bool = False) -> Tensor:
    """float32 [N, K] on the host, in the order of the split; `flip` averages with the mirrored image."""

    def at(batch_size: int) -> Tensor:
        with _loader(classifier, split, px, batch_size) as loader, torch.inference_mode():
            return torch.cat([_softmax(classifier, batch, flip).cpu() for batch in loader.batches()])

    return _fitting(classifier, at)


def _softmax(classifier: Classifier, batch: HostBatch, flip: bool) -> Tensor:
    images_BCHW = classifier.device_input.images(batch.images_BHWC)
    model = Mirrored(classifier.model) if flip else classifier.model
    with autocast(classifier.plan):
        return model(images_BCHW).float().softmax(1)


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
    info = classifier.info
    if info.max_side:
        split = replace(split, reader=ShrunkEachTime(info.max_side))
    return Loader(split, EvalPixels(split, px, info.crop_frac), px, batch_size, classifier.plan.loader)


def _readable(split: Split) -> tuple[Split, list[tuple[str, str]]]:
    """The split without its unreadable images, and those with their reasons."""
    names = list(split.names())
    reasons = check_files(split.root, names).reasons
    good = [index for index, name in enumerate(names) if name not in reasons]
    if not good:
        raise LowmemError(f"{split.root}: none of the {len(names)} images can be read.")
    kept = packed_split(split.root, (names[index] for index in good), split.labels[good])
    return kept, sorted(reasons.items())
