"""Energy that a card has used, by the counter that it keeps itself (NVML, since Volta)."""

import torch

from lowmem.nvml import card_joules, open_card


class EnergyMeter:
    """Joules between two calls; None where nothing counts them (a CPU, an older card)."""

    def __init__(self, device: torch.device) -> None:
        self.card = open_card(device)
        self.before_j = card_joules(self.card)

    def take_j(self) -> float | None:
        """Since the last call, or the start."""
        now_j, before_j = card_joules(self.card), self.before_j
        self.before_j = now_j
        return None if now_j is None or before_j is None else now_j - before_j
