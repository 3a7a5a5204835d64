"""When a measured time is known well enough."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_ROUNDS = 5
"""Fewer rounds than this have no quartiles worth the name."""
TARGET_FRAC = 0.02
"""A time is stable when its median is known to this share of itself."""
NOTCH = 1.57
"""Half-width of a 95 % interval of the median in units of IQR / sqrt(n) (McGill, Tukey and Larsen, Variations of box plots, 1978)."""


@dataclass(frozen=True)
class Spread:
    """The median of `n` rounds and their middle half."""

    median: float
    low: float
    high: float
    n: int

    @property
    def uncertainty_frac(self) -> float:
        """Half-width of the median's 95 % interval, as a share of the median; infinite for a single round."""
        if self.n < 2 or self.median <= 0:
            return math.inf
        return NOTCH * (self.high - self.low) / math.sqrt(self.n) / self.median


def spread(values: Sequence[float]) -> Spread:
    """The median and quartiles of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def is_stable(values: Sequence[float], target_frac: float = TARGET_FRAC) -> bool:
    """Whether more rounds would tell nothing new."""
    return len(values) >= MIN_ROUNDS and spread(values).uncertainty_frac <= target_frac
