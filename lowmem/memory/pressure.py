"""Thrashing, seen and named: host memory that is swapped, a card so full that its driver spills, a budget that is passed.

Swapping and spilling raise no error: a run gets many times slower and nothing says why. Every few seconds the watch reads what the
system tells (swap and page rates, available memory, Linux's pressure stall information, NVML for a card) and compares the time of
the latest steps with the usual one. A slow step alone is no sign, nor is a full memory that costs nothing; `diagnosis` decides, and
each cause is told once.
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from lowmem.nvml import card_bytes, open_card
from lowmem.sizes import MIB, format_size

EVERY_S = 5.0
SLOW_RATIO = 1.5
"""Latest steps over usual ones; training steps of one kind differ by a few percent."""
NUM_USUAL, NUM_LATEST = 512, 3
MIN_USUAL = 20
SWAP_BYTES_S = 4 * MIB
"""A swap rate that one sees: background swapping of idle pages stays below."""
STALLED_FRAC = 0.10
"""Share of the last 10 s in which some task waited for memory (Linux PSI)."""
HOST_LEFT_FRAC, CARD_LEFT_FRAC, OVER_BUDGET_FRAC = 0.02, 0.02, 0.05
PSI, VMSTAT = Path("/proc/pressure/memory"), Path("/proc/vmstat")


@dataclass(frozen=True)
class Reading:
    """What the system tells at one moment; None where it does not."""

    host_total_bytes: int
    host_available_bytes: int
    swap_bytes_s: float = 0.0
    """In and out, since the reading before."""
    stalled_frac: float | None = None
    card_total_bytes: int | None = None
    card_free_bytes: int | None = None
    own_card_bytes: int | None = None
    """What this process has on the card, context and allocator."""


@dataclass(frozen=True)
class Diagnosis:
    cause: str
    text: str


def diagnosis(
    reading: Reading, latest_step_s: float, usual_step_s: float | None, budget_bytes: int | None
) -> Diagnosis | None:
    """What is wrong, if anything; `usual_step_s` is None before there is a usual time."""
    ratio = latest_step_s / usual_step_s if usual_step_s else 1.0
    if _is_over_budget(reading, budget_bytes):
        return Diagnosis("over_budget", _over_budget_text(reading, budget_bytes or 0))
    if reading.host_available_bytes < HOST_LEFT_FRAC * reading.host_total_bytes:
        left = format_size(reading.host_available_bytes)
        return Diagnosis(
            "host_full",
            f"Only {left} of host memory are left; the system may end the run at any moment (nothing would be lost). Close other "
            f"programs, or stop with Ctrl-C and continue with fewer loader workers or another --vram.",
        )
    if ratio <= SLOW_RATIO:
        return None
    slower = f"Steps take {ratio:.1f} times their usual {1000 * (usual_step_s or 0):.0f} ms"
    if reading.swap_bytes_s > SWAP_BYTES_S:
        return Diagnosis(
            "host_swapping",
            f"{slower}: host memory is being swapped ({format_size(reading.swap_bytes_s)} a second). Close other programs, use fewer "
            f"loader workers, or stop with Ctrl-C and lowmem resume RUN --vram with more memory on the device, so that less is offloaded.",
        )
    if reading.stalled_frac is not None and reading.stalled_frac > STALLED_FRAC:
        return Diagnosis(
            "host_stalled",
            f"{slower}: programs wait for host memory {100 * reading.stalled_frac:.0f} % of the time. Close other programs, or continue "
            f"with fewer loader workers.",
        )
    if _card_is_full(reading):
        return Diagnosis(
            "card_full",
            f"{slower}: the card is full ({format_size(reading.card_free_bytes or 0)} of {format_size(reading.card_total_bytes or 0)} "
            f"are free), so its driver may be moving memory to the host. Close other programs on the card, or stop with Ctrl-C and "
            f"lowmem resume RUN --vram with less.",
        )
    return None


@dataclass
class PressureWatch:
    """Call `step` after every step; every few seconds it looks, and `warn` hears of each cause once."""

    read: Callable[[], Reading]
    warn: Callable[[Diagnosis], None]
    budget_bytes: int | None = None
    every_s: float = EVERY_S
    clock: Callable[[], float] = time.perf_counter
    told: set[str] = field(default_factory=set)
    _steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_USUAL))
    _before: float | None = None
    _looked: float | None = None

    def pause(self) -> None:
        """What comes until the next step (an evaluation, a save) is no step."""
        self._before = None

    def step(self) -> None:
        now = self.clock()
        if self._before is not None:
            self._steps_s.append(now - self._before)
        self._before = now
        if self._looked is None:
            self._looked = now
        if now - self._looked >= self.every_s:
            self._looked = now
            self._look()

    def _look(self) -> None:
        steps = list(self._steps_s)
        if len(steps) < NUM_LATEST:
            return
        usual = steps[:-NUM_LATEST]
        usual_s = statistics.median(usual) if len(usual) >= MIN_USUAL else None
        found = diagnosis(self.read(), statistics.median(steps[-NUM_LATEST:]), usual_s, self.budget_bytes)
        if found is not None and found.cause not in self.told:
            self.told.add(found.cause)
            self.warn(found)


class SystemReader:
    """Callable: a Reading of this computer and, on CUDA, of one card."""

    def __init__(self, device: torch.device) -> None:
        self.card = open_card(device)
        self.swapped = _swapped_bytes()
        self.when = time.monotonic()

    def __call__(self) -> Reading:
        memory, swapped, now = psutil.virtual_memory(), _swapped_bytes(), time.monotonic()
        rate = max(0, swapped - self.swapped) / max(now - self.when, 1e-3)
        self.swapped, self.when = swapped, now
        total, free, own = card_bytes(self.card)
        return Reading(memory.total, memory.available, rate, stalled_frac(), total, free, own)


def stalled_frac(path: Path = PSI) -> float | None:
    """Linux: the share of the last 10 s in which some task waited for memory."""
    try:
        fields = path.read_text(encoding="ascii").split()
        return float(next(item for item in fields if item.startswith("avg10=")).removeprefix("avg10=")) / 100
    except (OSError, ValueError, StopIteration):
        return None


def num_oom_kills(path: Path = VMSTAT) -> int:
    """How many processes Linux's memory killer has ended since the system started; 0 where the system does not tell."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("oom_kill ")))
    except (OSError, StopIteration, ValueError):
        return 0


def _is_over_budget(reading: Reading, budget_bytes: int | None) -> bool:
    own = reading.own_card_bytes
    return budget_bytes is not None and own is not None and own > (1 + OVER_BUDGET_FRAC) * budget_bytes


def _over_budget_text(reading: Reading, budget_bytes: int) -> str:
    return (
        f"The run has {format_size(reading.own_card_bytes or 0)} of the card, more than the {format_size(budget_bytes)} of --vram: the "
        f"CUDA context or a library takes more than was planned for. Stop with Ctrl-C and lowmem resume RUN --vram with less."
    )


def _card_is_full(reading: Reading) -> bool:
    free, total = reading.card_free_bytes, reading.card_total_bytes
    return free is not None and total is not None and free < CARD_LEFT_FRAC * total


def _swapped_bytes() -> int:
    """Bytes swapped in and out since the start of the system; Windows does not tell."""
    if sys.platform == "win32":
        return 0
    swap = psutil.swap_memory()
    return int(swap.sin + swap.sout)
