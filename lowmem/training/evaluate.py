"""How good a model is on labelled images: accuracy, macro precision, recall and F1, loss, confusion matrix.

Everything is summed on the device and fetched once at the end. Macro averages run over the classes that occur as a label or as a
prediction, and a class that was never predicted has precision 0 (scikit-learn's f1_score with zero_division=0).

Axes: B images, K classes.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lowmem.data.batch import HostBatch
from lowmem.data.device_input import DeviceInput
from lowmem.disk import replace_file
from lowmem.planning.plan import Plan
from lowmem.training.step import autocast

NUM_TOP = 5


class Evaluation(BaseModel):
    """Figures of one pass over a split; `confusion[truth][prediction]` counts images."""

    model_config = ConfigDict(frozen=True)

    classes: tuple[str, ...]
    num_images: int
    accuracy: float
    top5: float
    precision: float
    recall: float
    f1: float
    loss: float
    """Mean cross entropy over the images, without class weights or label smoothing."""
    confusion: tuple[tuple[int, ...], ...]
    px: int = 0

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


def evaluate(
    model: nn.Module,
    batches: Iterable[HostBatch],
    device_input: DeviceInput,
    plan: Plan,
    classes: tuple[str, ...],
    px: int = 0,
) -> Evaluation:
    """Evaluate in the plan's arithmetic; leaves the model in evaluation mode."""
    model.eval()
    num_classes = len(classes)
    device = device_input.device
    confusion_KK = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_top5 = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode():
        for batch in batches:
            labels_B = batch.labels_B.to(device, non_blocking=True)
            with autocast(plan):
                logits_BK = model(device_input.images(batch.images_BHWC)).float()
            loss_sum += F.cross_entropy(logits_BK, labels_B, reduction="none").double().sum()
            _count(confusion_KK, labels_B, logits_BK.argmax(1))
            num_top5 += _in_top(logits_BK, labels_B).sum()
    return _evaluation(confusion_KK.cpu(), float(loss_sum), int(num_top5), classes, px)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    replace_file(path, evaluation.model_dump_json(indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))


def _count(confusion_KK: Tensor, labels_B: Tensor, guesses_B: Tensor) -> None:
    """Add images to the matrix (rows are labels, columns predictions) on the device; torch.bincount would wait for it."""
    pairs_B = labels_B * confusion_KK.shape[1] + guesses_B
    confusion_KK.view(-1).index_add_(0, pairs_B, torch.ones_like(pairs_B))


def _in_top(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    top_B5 = logits_BK.topk(min(NUM_TOP, logits_BK.shape[1]), dim=1).indices
    return (top_B5 == labels_B[:, None]).any(1)


def _evaluation(confusion_KK: Tensor, loss_sum: float, num_top5: int, classes: tuple[str, ...], px: int) -> Evaluation:
    counts_KK = confusion_KK.double()
    num_images = int(confusion_KK.sum())
    hits_K, truths_K, guesses_K = counts_KK.diagonal(), counts_KK.sum(1), counts_KK.sum(0)
    seen_K = (truths_K + guesses_K) > 0
    precision_K = hits_K / guesses_K.clamp(min=1)
    recall_K = hits_K / truths_K.clamp(min=1)
    f1_K = 2 * hits_K / (truths_K + guesses_K).clamp(min=1)
    total = max(num_images, 1)
    return Evaluation(
        classes=classes,
        num_images=num_images,
        px=px,
        accuracy=float(hits_K.sum()) / total,
        top5=num_top5 / total,
        loss=loss_sum / total,
        precision=float(precision_K[seen_K].mean()),
        recall=float(recall_K[seen_K].mean()),
        f1=float(f1_K[seen_K].mean()),
        confusion=tuple(tuple(row) for row in confusion_KK.tolist()),
    )
