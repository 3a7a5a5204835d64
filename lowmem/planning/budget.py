"""What `--vram` means on a device: the bytes that tensors may use, line by line."""

import sys

import torch

from lowmem.errors import LowmemError
from lowmem.planning.calibration import Calibration, installed_versions, kept_calibration
from lowmem.planning.devices import DeviceSpec
from lowmem.planning.plan import Budget, BudgetLine
from lowmem.sizes import MIB, format_size

WORKSPACE_BYTES = 96 * MIB
"""cuDNN's scratch memory for one convolution, which a small card's free memory bounds; an estimate until measured."""
ROUNDING_FRAC = 0.02
"""The caching allocator's rounding (512 bytes, 2 MiB segments) and fragmentation, as a share; an estimate until measured."""
WINDOWS_RESERVE_BYTES = 250 * MIB
"""Windows' display driver model takes this from every process's share before it starts to spill to host memory."""


def budget_for(spec: DeviceSpec, vram_bytes: int, device: str) -> Budget:
    """The budget and its deductions; raises LowmemError where the device has less, or where nothing is left."""
    if spec.kind == "cpu":
        return Budget(total_bytes=vram_bytes)
    if vram_bytes > spec.memory_bytes * 1.05:
        raise LowmemError(
            f"--vram {format_size(vram_bytes)} is more than {spec.name} has ({format_size(spec.memory_bytes)}). Give at most that."
        )
    total = min(vram_bytes, spec.memory_bytes)
    known = kept_calibration(spec.name, installed_versions()) if spec.present else None
    context = _context_line(spec, known)
    lines = [context]
    others = _other_processes(spec, device, context.num_bytes)
    free_beyond = spec.memory_bytes - total
    if others > free_beyond:
        lines.append(BudgetLine(what="other processes on the card", num_bytes=others - free_beyond))
    if sys.platform == "win32" and spec.present:
        lines.append(BudgetLine(what="kept back by Windows", num_bytes=WINDOWS_RESERVE_BYTES))
    lines += _allocator_lines(total, known)
    budget = Budget(total_bytes=total, deductions=tuple(lines))
    if budget.tensor_bytes <= 0:
        raise LowmemError(
            f"--vram {format_size(vram_bytes)} leaves nothing for training: {format_size(total - budget.tensor_bytes)} are taken before the first tensor. Give more."
        )
    return budget


def _context_line(spec: DeviceSpec, known: Calibration | None) -> BudgetLine:
    if known is None or known.context_bytes is None:
        return BudgetLine(what="CUDA context, cuDNN and cuBLAS (estimated)", num_bytes=spec.context_bytes)
    return BudgetLine(what="CUDA context, cuDNN and cuBLAS (measured here)", num_bytes=known.context_bytes)


def _allocator_lines(total_bytes: int, known: Calibration | None) -> list[BudgetLine]:
    """What the allocator hands out beside tensors."""
    workspace, share, how = WORKSPACE_BYTES, ROUNDING_FRAC, "estimated"
    if known is not None:
        workspace, share, how = known.workspace_bytes, known.rounding_frac, f"fitted to {known.num_rows} runs here"
    return [
        BudgetLine(what=f"convolution workspace ({how})", num_bytes=workspace, in_allocator=True),
        BudgetLine(what=f"allocator rounding ({how})", num_bytes=int(share * total_bytes), in_allocator=True),
    ]


def _other_processes(spec: DeviceSpec, device: str, context_bytes: int) -> int:
    """Bytes of the card that somebody else holds; 0 where the card is not here."""
    if not spec.present or not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info(torch.device(device))
    return max(0, total - free - torch.cuda.memory_reserved(torch.device(device)) - context_bytes)
