"""Where the seconds of a run go: phases, marked where they begin and end, and read late.

    with phase("forward"): ...

A phase is exclusive: what runs in another one inside it (a recomputation inside the backward pass) is taken off it. Nothing is measured
unless a clock is open. On a CPU a mark is a reading of the clock. On CUDA it is an event on the current stream, read once the card has
passed it, so no step ever waits; seconds are then the card's own, and `waiting` is the time in which it had no batch to work on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

STEP_PHASES = ("copy", "forward", "recomputation", "backward", "optimizer", "step")
"""Inside a training step; `step` is what is left of it (mixing images, the average's copy, Python)."""
PHASES = ("waiting", *STEP_PHASES, "evaluation", "checkpoint", "other")
READ_EVERY = 1024
"""Marks on a card that wait to be read, at most; then those that it has passed are."""


class PhaseClock(Protocol):
    seconds: Counter[str]
    """Of each phase, since `take`."""
    steps_s: list[float]
    """Of each training step, without the wait for its images."""

    def mark(self, name: str) -> None:
        """From now on time belongs to this phase."""

    def take(self) -> tuple[Counter[str], list[float]]:
        """`seconds` and `steps_s` until now; both start again from nothing."""


class _Sums:
    """Adds stretches of time up."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps_s: list[float] = []
        self._step_s: float | None = None

    def add(self, name: str, seconds: float, following: str) -> None:
        """`seconds` in one phase, before another one."""
        self.seconds[name] += seconds
        if name in STEP_PHASES:
            self._step_s = (self._step_s or 0.0) + seconds
        if self._step_s is not None and following not in STEP_PHASES:
            self.steps_s.append(self._step_s)
            self._step_s = None

    def taken(self) -> tuple[Counter[str], list[float]]:
        seconds, steps_s = self.seconds, self.steps_s
        self.seconds, self.steps_s = Counter(), []
        return seconds, steps_s


class HostClock(_Sums):
    """Phases by the processor's clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.now = now
        self.current, self.since = "other", now()

    def mark(self, name: str) -> None:
        now = self.now()
        self.add(self.current, now - self.since, name)
        self.current, self.since = name, now

    def take(self) -> tuple[Counter[str], list[float]]:
        self.mark(self.current)
        return self.taken()


class CudaClock(_Sums):
    """Phases by events on the card's streams. `make_event` and `stream` stand for torch's in tests."""

    def __init__(
        self,
        device: torch.device,
        make_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        stream: Callable[[torch.device], Any] = torch.cuda.current_stream,
    ) -> None:
        super().__init__()
        self.device, self.make_event, self.stream = device, make_event, stream
        self.marks: deque[tuple[Any, str]] = deque()
        self.unused: list[Any] = []
        self.current = "other"
        self.mark("other")

    def mark(self, name: str) -> None:
        event = self.unused.pop() if self.unused else self.make_event()
        event.record(self.stream(self.device))
        self.marks.append((event, name))
        self.current = name
        if len(self.marks) % READ_EVERY == 0:
            self._read()

    def take(self) -> tuple[Counter[str], list[float]]:
        """Waits for the card to reach this point: call it where it has nothing to do anyway, at an epoch's end."""
        self.mark(self.current)
        self.marks[-1][0].synchronize()
        self._read()
        return self.taken()

    def _read(self) -> None:
        """Marks that the card has passed; the last one read stays as the start of the next stretch."""
        while len(self.marks) > 1 and self.marks[1][0].query():
            event, name = self.marks.popleft()
            following, following_name = self.marks[0]
            self.add(name, event.elapsed_time(following) / 1000, following_name)
            self.unused.append(event)


class _Now:
    """The running phase and the open clock of this process; a backward pass on a card runs in a thread of its own."""

    name = "other"
    clock: PhaseClock | None = None


def clock_for(device: torch.device) -> PhaseClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def current_phase() -> str:
    return _Now.name


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Context: what runs inside belongs to this phase."""
    before, _Now.name = _Now.name, name
    if _Now.clock is not None:
        _Now.clock.mark(name)
    try:
        yield
    finally:
        _Now.name = before
        if _Now.clock is not None:
            _Now.clock.mark(before)


@contextmanager
def timing_phases(clock: PhaseClock) -> Iterator[None]:
    """Context: phases are timed by this clock."""
    before, _Now.clock = _Now.clock, clock
    clock.mark(_Now.name)
    try:
        yield
    finally:
        _Now.clock = before
