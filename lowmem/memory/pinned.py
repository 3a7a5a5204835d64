"""Host memory that a card reads and writes by itself, carved out of large pieces.

The allocator of pinned memory hands out powers of two (pytorch #95823), so a buffer of 51 MiB of its own would take 64; out of pieces of
256 MiB about one part in ten is lost.
"""

import torch
from torch import Tensor

from lowmem.memory.meter import host_memory
from lowmem.sizes import MIB

PIECE_BYTES = 256 * MIB
ALIGN_BYTES = 4096


class HostArena:
    """Hands out host memory that it never takes back; what is handed out keeps its piece alive."""

    def __init__(self, pinned: bool, piece_bytes: int = PIECE_BYTES) -> None:
        self.pinned, self.piece_bytes = pinned, piece_bytes
        self.piece = torch.empty(0, dtype=torch.uint8)
        self.used = 0
        self.held_bytes = 0
        """All pieces together."""

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] with whatever was in it."""
        if self.used + num_bytes > len(self.piece):
            self.piece, self.used = self._new_piece(max(num_bytes, self.piece_bytes)), 0
        taken = self.piece[self.used : self.used + num_bytes]
        self.used += -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        return taken

    def _new_piece(self, num_bytes: int) -> Tensor:
        self.held_bytes += num_bytes
        with host_memory():
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.pinned)
