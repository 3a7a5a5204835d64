"""The loss, normalised once over the whole batch whatever the micro-batches.

    loss = sum_i w[y_i] CE(logits_i, y_i) / sum_i w[y_i]        (or / B, where the recipe divides by images)

Under mixup each image has two hard labels a, b with weights lam, 1 - lam, so both sums run over 2 B weighted terms.
PyTorch's own `weight` argument divides by the weights of the call it is in, which makes the mean of micro-batches another
loss, and by B instead of the sum of weights for soft targets (pytorch #72047).

Axes: B images, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.data.batch import Targets
from lowmem.recipe import LossRecipe


class Objective:
    """Cross entropy with class weights and label smoothing.

    `class_counts_K`: images of each class in the training set, int64 [K].
    """

    def __init__(self, recipe: LossRecipe, class_counts_K: Tensor, device: torch.device | str) -> None:
        self.label_smoothing = recipe.label_smoothing
        self.by_images = recipe.divide_by == "images"
        self.weights_K = class_weights(recipe.class_weights, class_counts_K).to(device)

    def total_weight(self, targets: Targets) -> Tensor:
        """What the loss of a whole batch is divided by, float32 scalar on the device."""
        if self.by_images:
            return torch.full((), float(len(targets.labels_B)), device=self.weights_K.device)
        total = self.weights_K[targets.labels_B].sum()
        if targets.partner_labels_B is None:
            return total
        return targets.lam * total + (1 - targets.lam) * self.weights_K[targets.partner_labels_B].sum()

    def loss_sum(self, logits_BK: Tensor, targets: Targets) -> Tensor:
        """The weighted sum of losses of some rows of a batch, float32 scalar; divide by `total_weight` of the batch."""
        total = self._hard_label_sum(logits_BK, targets.labels_B)
        if targets.partner_labels_B is None:
            return total
        return targets.lam * total + (1 - targets.lam) * self._hard_label_sum(logits_BK, targets.partner_labels_B)

    def _hard_label_sum(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(
            logits_BK.float(), labels_B, weight=self.weights_K, reduction="sum", label_smoothing=self.label_smoothing
        )


def class_weights(kind: str, class_counts_K: Tensor) -> Tensor:
    """float32 [K]: ones, 1 / count, or images / (K count); a class without images weighs nothing."""
    counts_K = class_counts_K.double()
    present_K = counts_K > 0
    if kind == "none":
        return torch.ones_like(counts_K).float()
    reciprocal_K = torch.where(present_K, 1 / counts_K.clamp(min=1), 0.0)
    if kind == "reciprocal":
        return reciprocal_K.float()
    return (counts_K.sum() / len(counts_K) * reciprocal_K).float()
