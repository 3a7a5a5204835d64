"""Pixels on the device: copy, normalise, mix, in the plan's memory format.

On CUDA the copy runs on one side stream for the whole run, so that it goes on beside the step before; the main stream waits for it, and
the copy's memory is marked as used there, or it could be handed out again while the main stream still reads it. A uint8 batch [B, H, W, C] seen as [B, C, H, W] is channels_last already, so nothing is rearranged. Axes as in batch.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.data.batch import DeviceBatch, HostBatch, Targets
from lowmem.data.mixup import MixupDraw, draw_mixup
from lowmem.memory.meter import host_memory
from lowmem.recipe import MixupRecipe


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel, as shares of 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class DeviceInput:
    """Turns host batches into what the model takes."""

    def __init__(
        self,
        norm: Normalisation,
        device: torch.device,
        memory_format: str,
        mixup: MixupRecipe | None = None,
        seed: int = 0,
    ) -> None:
        self.device, self.mixup, self.seed = device, mixup, seed
        self.channels_last = memory_format == "channels_last"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.shift_C = torch.tensor([255 * value for value in norm.mean], device=device).view(1, -1, 1, 1)
        self.scale_C = torch.tensor([1 / (255 * value) for value in norm.std], device=device).view(1, -1, 1, 1)

    def prepare(self, batch: HostBatch, epoch: int, step: int) -> DeviceBatch:
        """A training batch, mixed where the recipe says so; copies from pinned memory do not block."""
        draw = self._draw(epoch, step, len(batch.labels_B))
        labels_B = self._fetched(batch.labels_B)
        images_BCHW = self.images(batch.images_BHWC)
        if draw is None:
            return DeviceBatch(images_BCHW, Targets(labels_B))
        return self._mixed(images_BCHW, labels_B, draw)

    def is_mixed(self, epoch: int, step: int) -> bool:
        return self._draw(epoch, step, 1) is not None

    def images(self, images_BHWC: Tensor) -> Tensor:
        """uint8 [B, H, W, C] in host memory -> float32 [B, C, H, W] on the device, normalised."""
        with host_memory():
            host_BCHW = images_BHWC.permute(0, 3, 1, 2)
        pixels_BCHW = self._fetched(host_BCHW)
        x_BCHW = pixels_BCHW.float() if self.channels_last else pixels_BCHW.float().contiguous()
        return x_BCHW.sub_(self.shift_C).mul_(self.scale_C)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What stays on the device."""
        return self.shift_C, self.scale_C

    def _fetched(self, host: Tensor) -> Tensor:
        """A tensor of the host on the device, ready for the current stream; from pinned memory nothing waits here."""
        if self.stream is None:
            return host.to(self.device)
        with torch.cuda.stream(self.stream):
            fetched = host.to(self.device, non_blocking=True)
        main = torch.cuda.current_stream(self.device)
        main.wait_stream(self.stream)
        fetched.record_stream(main)
        return fetched

    def _draw(self, epoch: int, step: int, batch_size: int) -> MixupDraw | None:
        return None if self.mixup is None else draw_mixup(self.mixup, self.seed, epoch, step, batch_size)

    def _mixed(self, images_BCHW: Tensor, labels_B: Tensor, draw: MixupDraw) -> DeviceBatch:
        host_B = torch.from_numpy(draw.partner_B)
        partner_B = self._fetched(host_B if self.stream is None else host_B.pin_memory())
        partners_BCHW = images_BCHW[partner_B]
        mixed_BCHW = images_BCHW.mul_(draw.lam).add_(partners_BCHW, alpha=1 - draw.lam)
        return DeviceBatch(mixed_BCHW, Targets(labels_B, labels_B[partner_B], draw.lam))
