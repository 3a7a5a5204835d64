"""The losses of an epoch's steps, read without making the device wait."""

import torch
from torch import Tensor


class StepLosses:
    """One float32 per step, kept on the device; `latest` never synchronises, `values` does."""

    def __init__(self, num_steps: int, device: torch.device, done: tuple[float, ...] = ()) -> None:
        self.losses_S = torch.zeros(num_steps, device=device)
        self.num_done = len(done)
        if done:
            self.losses_S[: len(done)] = torch.tensor(done, device=device)
        self._latest: float | None = done[-1] if done else None
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None
        self._pinned = torch.zeros((), pin_memory=True) if device.type == "cuda" else None

    def put(self, loss: Tensor) -> None:
        self.losses_S[self.num_done] = loss
        self.num_done += 1
        if self._pinned is None:
            self._latest = float(loss)
        elif self._copy is None:
            self._start_copy(loss)

    def latest(self) -> float | None:
        """The newest loss that has arrived on the host."""
        if self._copy is not None and self._copy[1].query():
            self._latest = float(self._copy[0])
            self._copy = None
        return self._latest

    def values(self) -> tuple[float, ...]:
        return tuple(self.losses_S[: self.num_done].tolist())

    def _start_copy(self, loss: Tensor) -> None:
        assert self._pinned is not None
        self._pinned.copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._copy = (self._pinned, arrived)
