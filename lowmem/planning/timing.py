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

    def bandwidth_bound_frac(self, ops: Sequence[OpCost]) -> float:
        """The share of these operations' seconds that is spent in kernels which wait for the device's memory, by the roofline."""
        bound_s = sum(self.op_seconds(op) for op in ops if self._memory_s(op) > self._compute_s(op))
        return bound_s / max(self.seconds(ops), 1e-12)

    def _roofline(self, op: OpCost) -> float:
        return max(self._compute_s(op), self._memory_s(op)) + LAUNCH_S[self.spec.kind]

    def _compute_s(self, op: OpCost) -> float:
        peak = self.spec.flops.get(op.dtype) or self.spec.flops["fp32"]
        return op.flops / ((GROUPED_EFFICIENCY if op.groups > 1 else COMPUTE_EFFICIENCY) * peak)

    def _memory_s(self, op: OpCost) -> float:
        return op.num_bytes / (BANDWIDTH_EFFICIENCY * self.spec.bandwidth)


def link_seconds(num_bytes: int, spec: DeviceSpec) -> float:
    """One way between host and device."""
    return num_bytes / spec.host_link


def hidden_copy_seconds(num_bytes: int, spec: DeviceSpec, bound_frac: float) -> float:
    """What a copy behind the kernels costs them.

    A copy takes memory bandwidth from the kernels beside it. One that waits for its arithmetic has bandwidth to spare and loses
    nothing; one that waits for memory is later by what the copy took. The copies run all the time and meet every kernel, so `bound_frac`
    of the bytes (`Clock.bandwidth_bound_frac`) are charged, each in full: kernels that do not reach the memory's peak rate anyway
    may lose less. What a kernel loses of the second-level cache is not in it. On a CPU the cores that compute copy as well, and
    nothing is hidden.
    """
    return link_seconds(num_bytes, spec) if spec.kind == "cpu" else bound_frac * num_bytes / spec.bandwidth


def optimizer_seconds(num_parameters: int, placement: str, spec: DeviceSpec, bound_frac: float) -> float:
    """AdamW reads weight, gradient and two moments and writes three of them, 28 bytes a weight.

    `host` also moves the moments both ways, in the open; `host_backward` does so behind the backward pass.
    """
    update_s = 28 * num_parameters / (BANDWIDTH_EFFICIENCY * spec.bandwidth)
    moved_bytes = 16 * num_parameters
    if placement == "host":
        return update_s + link_seconds(moved_bytes, spec)
    return update_s + (hidden_copy_seconds(moved_bytes, spec, bound_frac) if placement == "host_backward" else 0.0)


def ema_seconds(num_bytes: int, spec: DeviceSpec) -> float:
    """The average of weights and statistics is read and written, and they are read."""
    return 3 * num_bytes / (BANDWIDTH_EFFICIENCY * spec.bandwidth)
