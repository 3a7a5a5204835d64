"""What the bytes on a device are for: a recorded step, sorted into weights, gradients, optimizer, activations, inputs and workspace.

The meter names each allocation by the phase in which it was made; a gradient is recognised when its weight has it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from lowmem.memory.meter import MemoryMeter, Timeline
from lowmem.planning.plan import MemoryBreakdown

CATEGORY_OF_PHASE = {"copy": "inputs", "forward": "activations"}
"""What is made in other phases is workspace, recomputed activations with it."""
CATEGORIES = tuple(MemoryBreakdown.model_fields)


def category(label: str) -> str:
    """What an allocation is for, by its label."""
    return label if label in CATEGORIES else CATEGORY_OF_PHASE.get(label, "workspace")


def breakdown_at_peak(timeline: Timeline) -> MemoryBreakdown:
    """Bytes by what they are for at the first moment at which most are live."""
    sums: Counter[str] = Counter()
    for item in timeline.live_at(timeline.peak_time()):
        sums[category(item.label)] += item.num_bytes
    return MemoryBreakdown(**sums)


@contextmanager
def naming_gradients(meter: MemoryMeter, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Context: allocations that become the gradients of these weights are labelled so. Nothing is computed or kept."""
    weights = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(partial(_name, meter)) for weight in weights]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _name(meter: MemoryMeter, weight: Tensor) -> None:
    if weight.grad is None or meter.timeline is None:  # an optimizer in the backward pass has taken it
        return
    item = meter.timeline.live_now.get(weight.grad.untyped_storage()._cdata)
    if item is not None:
        item.label = "gradients"
