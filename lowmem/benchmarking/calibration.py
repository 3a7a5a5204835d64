"""The planner's roofline against what was measured: one factor for each kind of device, with its error.

The factor of a device is the geometric mean of measured over predicted step times in its budgets; that of a kind is the geometric mean
over its devices. The error says how far a device lies from the factor made from all the others (leave one out). With a single device
there is no other to ask, so the error is how far its own budgets lie from its factor, and says nothing about other devices.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Calibration:
    """`factor` multiplies predicted times; `error_frac` is the largest relative error, None where nothing was measured."""

    factor: float = 1.0
    error_frac: float | None = None
    devices: tuple[str, ...] = ()
    basis: Literal["devices", "budgets", "none"] = "none"
    """What the error was found over."""

    def in_words(self) -> str:
        if self.basis == "none":
            return "the data sheet's roofline as it is: no device of this kind was measured"
        names = ", ".join(self.devices)
        if self.basis == "budgets":
            return f"roofline x {self.factor:.3g} from {names} alone; within {self.error_frac:.0%} over its budgets, unknown for other devices"
        return f"roofline x {self.factor:.3g} from {names}; each within {self.error_frac:.0%} of what the others say"


def calibrate(ratios: Mapping[str, Sequence[float]]) -> Calibration:
    """`ratios`: measured over predicted step times by device, of one kind of device."""
    factors = {name: geometric_mean(values) for name, values in ratios.items() if values}
    if not factors:
        return Calibration()
    names = tuple(factors)
    if len(names) == 1:
        factor = factors[names[0]]
        return Calibration(factor, max(_off(value, factor) for value in ratios[names[0]]), names, "budgets")
    left_out = [
        _off(own, geometric_mean([other for name, other in factors.items() if name != left]))
        for left, own in factors.items()
    ]
    return Calibration(geometric_mean(list(factors.values())), max(left_out), names, "devices")


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _off(measured: float, said: float) -> float:
    """How far a prediction is from what was measured, as a share of the measured."""
    return abs(said / measured - 1)
