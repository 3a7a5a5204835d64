"""How long operations take on the device that is here: each distinct block of a network, run for real and timed operation by operation.

The times of a block's operations are kept under what the planner knows of them (name, arithmetic, bytes, dtype, groups), in a file in the
user's cache for each device, thread count and versions, so that each is measured once on a machine. On CUDA the operations of a block
are queued behind a kernel that waits, so that what is timed is the card and not the Python that launches it.
"""

import copy
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lowmem.disk import replace_file
from lowmem.memory.limit import is_out_of_memory
from lowmem.planning.cost import OpCost, op_cost
from lowmem.planning.kept import kept_file
from lowmem.planning.plan import Plan
from lowmem.planning.trace import BlockMoments
from lowmem.training.step import autocast

SAME_BYTES_FRAC = 0.03
"""Operations of one kind whose bytes differ by less are one; cuDNN's batch norm also returns a small reserve."""
WARMUPS, REPEATS = 1, 3
BUDGET_S = {"cuda": 10.0, "cpu": 4.0}
"""After this no further block is begun; what was not measured is the roofline, scaled by what was."""
WAIT_CYCLES = 40_000_000
"""About 20 ms at 2 GHz: longer than Python needs to queue a block's operations."""
_ALIASES = (
    (re.compile(r"(cudnn|miopen)_batch_norm"), "native_batch_norm"),
    (re.compile(r"_scaled_dot_product_\w*attention(_for_cpu)?_backward"), "attention_backward"),
    (re.compile(r"_scaled_dot_product_\w*attention(_for_cpu)?"), "attention"),
)

Kind = tuple[str, str, int, int]


@dataclass
class MeasuredTimes:
    """Seconds of operations by kind (name, dtype, groups, arithmetic), each with its bytes; `blocks` are done."""

    kinds: dict[Kind, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    blocks: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def find(self, op: OpCost) -> float | None:
        near = [
            (abs(num_bytes - op.num_bytes), seconds)
            for num_bytes, seconds in self.kinds.get(_kind(op), ())
            if abs(num_bytes - op.num_bytes) <= SAME_BYTES_FRAC * op.num_bytes
        ]
        return min(near)[1] if near else None

    def add(self, op: OpCost, seconds: float) -> None:
        if self.find(op) is None:
            self.kinds[_kind(op)].append((op.num_bytes, seconds))

    def against(self, estimate: Callable[[OpCost], float]) -> float:
        """All measured times over their estimates."""
        pairs = [
            (seconds, estimate(OpCost(name, flops, num_bytes, dtype, groups)))
            for (name, dtype, groups, flops), entries in self.kinds.items()
            for num_bytes, seconds in entries
        ]
        return sum(seconds for seconds, _ in pairs) / sum(estimated for _, estimated in pairs)

    def save(self, path: Path) -> None:
        rows = [[*kind, *entry] for kind, entries in self.kinds.items() for entry in entries]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"columns": COLUMNS, "rows": rows, "blocks": sorted(self.blocks)}))


COLUMNS = ["name", "dtype", "groups", "flops", "bytes", "seconds"]


def load_times(path: Path) -> MeasuredTimes:
    """What was measured before; nothing where there is no such file or it is damaged."""
    times = MeasuredTimes()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, dtype, groups, flops, num_bytes, seconds in content["rows"]:
            times.kinds[(str(name), str(dtype), int(groups), int(flops))].append((int(num_bytes), float(seconds)))
        times.blocks = set(map(str, content["blocks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return MeasuredTimes()
    return times


def times_file(device: torch.device, memory_format: str) -> Path:
    """Where the times of a device are kept."""
    return kept_file("times", device, memory_format)


def measured_times(
    blocks: dict[str, tuple[nn.Module, BlockMoments]],
    plan: Plan,
    device: torch.device,
    path: Path,
    say: Callable[[str], None] = lambda text: None,
) -> MeasuredTimes:
    """Times of all operations of the blocks on `device`: from `path` where they are known, else measured and added to it.

    `blocks`: a block of fake tensors and how it is called for each kind of block, the most important kind first.
    """
    times, started, budget_s = load_times(path), time.perf_counter(), BUDGET_S[device.type]
    plan = plan.model_copy(update={"device": str(device)})
    wanted = {kind: block for kind, block in blocks.items() if _digest(kind, plan) not in times.blocks}
    for number, (kind, (block, moments)) in enumerate(wanted.items()):
        if time.perf_counter() - started > budget_s:
            say(f"Measured {number} of {len(wanted)} kinds of blocks in {budget_s:.0f} s; the others are estimated from them.")
            break
        for op, seconds in _block_times(block, moments, plan, device):
            times.add(op, seconds)
        times.blocks.add(_digest(kind, plan))
    if wanted:
        times.save(path)
    return times


def _digest(kind: str, plan: Plan) -> str:
    return hashlib.sha256(f"{kind} {plan.amp_dtype}".encode()).hexdigest()[:16]


def _block_times(
    block: nn.Module, moments: BlockMoments, plan: Plan, device: torch.device
) -> list[tuple[OpCost, float]]:
    """(operation, seconds) over a block's forward and backward pass, the least of the repeats, which other programs disturb least;
    nothing where the block does not fit on the device."""
    try:
        real = _real_block(block, device)
        runs = [_timed_run(real, moments, plan, device) for _ in range(WARMUPS + REPEATS)][WARMUPS:]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        runs = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [(steps[0][0], min(seconds for _, seconds in steps)) for steps in zip(*runs)]


def _real_block(block: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a block of fake tensors with real ones: small random weights, ones for statistics."""
    real = copy.deepcopy(block)
    for module in real.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = _filled(tensor, device)
    return real.train()


def _filled(tensor: Tensor, device: torch.device) -> Tensor:
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    made = made.normal_(std=0.05) if tensor.is_floating_point() else made.zero_()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made.abs_().add_(1) if made.is_floating_point() else made


def _timed_run(
    block: nn.Module, moments: BlockMoments, plan: Plan, device: torch.device
) -> list[tuple[OpCost, float]]:
    def made(meta: Tensor) -> Tensor:
        filled = _filled(meta, device)
        return filled.requires_grad_() if filled.is_floating_point() else filled

    args, kwargs = tree_map_only(Tensor, made, moments.args), tree_map_only(Tensor, made, moments.kwargs)
    args, kwargs = tree_map_only(Tensor, lambda t: t.mul(1.0) if t.requires_grad else t, (args, kwargs))
    forward, backward = OpTimer(device), OpTimer(device)
    with forward, autocast(plan):
        output = next(t for t in tree_leaves(block(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad)
    grad = torch.ones_like(output)
    with backward:
        torch.autograd.backward([output], [grad])
    block.zero_grad(set_to_none=True)
    return forward.times() + backward.times()


class OpTimer(TorchDispatchMode):
    """Context: the time of every operation that moves anything."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.marks: list[tuple[OpCost, Any, Any]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap the dispatch function against being compiled, at 10 microseconds an operation."""
        return False

    def __enter__(self) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda._sleep(WAIT_CYCLES)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = self._now()
        result = func(*args, **(kwargs or {}))
        ended = self._now()
        cost = op_cost(func, args, kwargs, result)
        if cost is not None:
            self.marks.append((cost, started, ended))
        return result

    def times(self) -> list[tuple[OpCost, float]]:
        """Operations in order with their seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [(cost, start.elapsed_time(end) / 1000) for cost, start, end in self.marks]
        return [(cost, end - start) for cost, start, end in self.marks]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _kind(op: OpCost) -> Kind:
    name = op.name
    for pattern, alias in _ALIASES:
        name = pattern.sub(alias, name)
    return name, op.dtype, op.groups, op.flops
