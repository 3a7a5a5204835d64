"""Ctrl-C and SIGTERM (on Windows Ctrl-Break): in a run, once asks for a stop after the running step, twice stops at once; outside
of one, once stops at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if os.name == "nt" else []))  # type: ignore[attr-defined]
EXIT_STOPPED = 130
NOTICE = b"\nStopping: the running step is finished and saved. Again to stop at once; the last checkpoint is whole.\n"
IMPORTER = "<frozen importlib._bootstrap>"
Handler = Callable[[int, FrameType | None], None]


class StoppedError(Exception):
    """The user asked for a stop, and a checkpoint has been written."""


class StopRequest:
    """Context: while it is open, the first signal only sets `requested`; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = _handled_by(self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        _handle_as(self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            stop_at_once(number, frame)
        self.requested = True
        _write(NOTICE)  # print may be in the middle of a line of its own


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Context: a signal raises KeyboardInterrupt, or ends the process where that would be lost."""
    before = _handled_by(stop_at_once)
    try:
        yield
    finally:
        _handle_as(before)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Some modules swallow a KeyboardInterrupt while they are imported, and numpy recurses to death after one."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTER:
            _write(b"\nStopped.\n")
            os._exit(EXIT_STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _handled_by(handler: Handler) -> dict[int, object]:
    """Install a handler; returns those before it, none outside of the main thread: whoever runs us there handles signals."""
    try:
        return {number: signal.signal(number, handler) for number in SIGNALS}
    except ValueError:
        return {}


def _handle_as(before: dict[int, object]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)  # type: ignore[arg-type]


def _write(text: bytes) -> None:
    with suppress(OSError):
        os.write(2, text)
