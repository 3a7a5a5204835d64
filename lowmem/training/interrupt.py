"""Ctrl-C and SIGTERM (on Windows Ctrl-Break): once asks for a stop after the running step, twice stops at once."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if os.name == "nt" else []))  # type: ignore[attr-defined]
NOTICE = b"\nStopping: the running step is finished and saved. Again to stop at once; the last checkpoint is whole.\n"


class StoppedError(Exception):
    """The user asked for a stop, and a checkpoint has been written."""


class StopRequest:
    """Context: while it is open, the first signal only sets `requested`; the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        try:
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        try:
            os.write(2, NOTICE)  # print may be in the middle of a line of its own
        except OSError:
            pass
