"""What becomes of a run that lost a worker process: why the worker is gone, and whether another takes its place.

One that died or hung is replaced. One that the system's memory killer took is not, while others are left: another would be taken
too. Too many losses, or a worker that never started, end the run.
"""

import signal
from dataclasses import dataclass, field

from lowmem.memory.pressure import num_oom_kills

SILENT_S = 8.0
"""A worker without a sign of life for this long is hung; it sends one twice a second."""
START_S = 60.0
"""A worker may take this long to start (antivirus, a slow disk)."""
MAX_RESTARTS = 10
NO_MEMORY_ON_WINDOWS = {0xC0000017, 0xC000012D}
"""STATUS_NO_MEMORY, STATUS_COMMITMENT_LIMIT."""


@dataclass(frozen=True)
class Loss:
    """One worker that is gone: its name in words, its exit code, whether it was ended for its silence, whether it had ever started."""

    worker: str
    code: int
    hung: bool
    started: bool


@dataclass(frozen=True)
class Verdict:
    """`cause`: what happened; `text`: that, and what follows. The run ends (`fatal`), or goes on with or without a `replacement`."""

    cause: str
    text: str
    fatal: bool = False
    replacement: bool = False


@dataclass
class Losses:
    """Judges one loss after the other."""

    num_restarts: int = 0
    oom_kills: int = field(default_factory=lambda: num_oom_kills())

    def judge(self, loss: Loss, num_left: int) -> Verdict:
        """What follows, with `num_left` workers left."""
        before, self.oom_kills = self.oom_kills, num_oom_kills()
        cause, out_of_memory = cause_of(loss, self.oom_kills - before)
        self.num_restarts += 1
        if not loss.started or self.num_restarts > MAX_RESTARTS:
            return Verdict(cause, f"{cause}. Use loader threads instead: --loader threads.", fatal=True)
        if not out_of_memory:
            return Verdict(cause, f"{cause}. Another takes its place, with the same images.", replacement=True)
        if num_left:
            return Verdict(cause, f"{cause}. The run goes on with {num_left}, in the same order.")
        return Verdict(
            cause,
            f"{cause}, and it was the last one. Continue with less: lowmem resume RUN --ram with less.",
            fatal=True,
        )


def cause_of(loss: Loss, new_oom_kills: int) -> tuple[str, bool]:
    """What happened to a worker, in words, and whether it was for want of memory."""
    if loss.hung:
        return f"{loss.worker} gave no sign of life for {SILENT_S:.0f} s and was ended", False
    if loss.code == -getattr(signal, "SIGKILL", 9) and new_oom_kills > 0:
        return f"{loss.worker} was ended by the system's memory killer: host memory is full", True
    if loss.code & 0xFFFFFFFF in NO_MEMORY_ON_WINDOWS:
        return f"{loss.worker} ended for want of memory", True
    known = loss.code < 0 and -loss.code in list(signal.Signals)
    return f"{loss.worker} died ({signal.Signals(-loss.code).name if known else f'exit code {loss.code}'})", False


def is_too_silent(silent_s: float, started: bool) -> bool:
    return silent_s > (SILENT_S if started else START_S)
