"""Seconds of an operation on a device: measured there (measure.py), or a roofline from the device's data sheet.

    seconds = max(flops / (efficiency x peak), bytes / (efficiency x bandwidth)) + launch

The efficiencies are what well-shaped kernels reach in training; grouped convolutions reach less. They were set so that the
RTX 3090's rates in timm's published training benchmark (AMP, channels_last: resnet50 1218 images/s, seresnextaa101d_32x8d 244)
come out within a few per cent.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from lowmem.planning.cost import OpCost
from lowmem.planning.devices import DeviceSpec

if TYPE_CHECKING:
    from lowmem.planning.measure import MeasuredTimes

COMPUTE_EFFICIENCY = 0.60
GROUPED_EFFICIENCY = 0.30
BANDWIDTH_EFFICIENCY = 0.80
MOSTLY = 0.7
LAUNCH_S = {"cuda": 6e-6, "cpu": 4e-6}


class Clock:
    """Seconds of operations on one device: as measured there, where `measured` has them, and otherwise a roofline, scaled by
    what the measured ones took against theirs."""

    def __init__(self, spec: DeviceSpec, measured: "MeasuredTimes | None" = None) -> None:
        self.spec, self.measured = spec, measured
        self.factor = measured.against(self._roofline) if measured else 1.0

    def source(self, ops: Sequence[OpCost]) -> Literal["measured", "roofline"]:
        """Where most of these operations' time comes from."""
        found_s = sum(self.op_seconds(op) for op in ops if self.measured and self.measured.find(op) is not None)
        return "measured" if found_s > MOSTLY * self.seconds(ops) else "roofline"

    def op_seconds(self, op: OpCost) -> float:
        found = self.measured.find(op) if self.measured else None
        return self.factor * self._roofline(op) if found is None else found

    def seconds(self, ops: Iterable[OpCost]) -> float:
        return sum(self.op_seconds(op) for op in ops)

    def _roofline(self, op: OpCost) -> float:
        peak = self.spec.flops.get(op.dtype) or self.spec.flops["fp32"]
        efficiency = GROUPED_EFFICIENCY if op.groups > 1 else COMPUTE_EFFICIENCY
        compute_s = op.flops / (efficiency * peak)
        memory_s = op.num_bytes / (BANDWIDTH_EFFICIENCY * self.spec.bandwidth)
        return max(compute_s, memory_s) + LAUNCH_S[self.spec.kind]


def link_seconds(num_bytes: int, spec: DeviceSpec) -> float:
    """One way between host and device."""
    return num_bytes / spec.host_link


def hidden_copy_seconds(num_bytes: int, spec: DeviceSpec) -> float:
    """What a copy behind the kernels costs them: the memory bandwidth that it takes."""
    return num_bytes / spec.bandwidth


def optimizer_seconds(num_parameters: int, placement: str, spec: DeviceSpec) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them, 28 bytes a weight.

    `host` also moves the moments both ways, in the open; `host_backward` does so behind the backward pass.
    """
    update_s = 28 * num_parameters / (BANDWIDTH_EFFICIENCY * spec.bandwidth)
    moved_bytes = 16 * num_parameters
    if placement == "host":
        return update_s + link_seconds(moved_bytes, spec)
    return update_s + (hidden_copy_seconds(moved_bytes, spec) if placement == "host_backward" else 0.0)


def ema_seconds(num_bytes: int, spec: DeviceSpec) -> float:
    """The average of weights and statistics is read and written, and they are read."""
    return 3 * num_bytes / (BANDWIDTH_EFFICIENCY * spec.bandwidth)
