"""What travels from the loader to the training step. Axes: B images, H W pixels, C channels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HostBatch:
    """A batch as the loader gives it, in host memory: uint8 [B, H, W, C], int64 [B], int64 [B] (index in the split)."""

    images_BHWC: Tensor
    labels_B: Tensor
    indices_B: Tensor


@dataclass(frozen=True)
class Targets:
    """Labels of a batch: `labels_B` for `lam`, `partner_labels_B` for the rest; int64, on the device of the logits."""

    labels_B: Tensor
    partner_labels_B: Tensor | None = None
    lam: float = 1.0

    def rows(self, start: int, stop: int) -> "Targets":
        partner = None if self.partner_labels_B is None else self.partner_labels_B[start:stop]
        return Targets(self.labels_B[start:stop], partner, self.lam)


@dataclass(frozen=True)
class DeviceBatch:
    """A batch as the model takes it: `images_BCHW` float32, normalised and mixed, in the plan's memory format."""

    images_BCHW: Tensor
    targets: Targets
