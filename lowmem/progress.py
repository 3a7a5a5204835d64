"""What a user sees while a run goes on: a live line in a terminal, plain lines where there is none."""

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lowmem.results.history import EpochRow
from lowmem.sizes import format_size

PLAIN_EVERY_S = 10.0


class Progress(Protocol):
    def start(self, total_epochs: int, steps_per_epoch: int, first_epoch: int = 1) -> None: ...

    def begin_epoch(self, epoch: int) -> None: ...

    def step(self, done: int, loss: float | None, lr: float, images_per_s: float, peak_bytes: int) -> None:
        """`done` steps of the epoch are over."""

    def epoch(self, row: EpochRow, best: bool) -> None:
        """An epoch and its validation are over."""

    def checking(self, done: int, total: int) -> None:
        """Files checked before training."""

    def shrinking(self, done: int, total: int) -> None:
        """Images shrunk before training."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def close(self) -> None: ...


@contextmanager
def open_progress(console: Console | None = None) -> Iterator[Progress]:
    """Context: the display that suits the console."""
    console = console or Console(highlight=False)
    display: Progress = LiveProgress(console) if console.is_terminal else PlainProgress(console)
    try:
        yield display
    finally:
        display.close()


class PlainProgress:
    """One line an epoch, and at most one in ten seconds within it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total_epochs = self.steps_per_epoch = self.first_epoch = self.current = 0
        self.told = time.monotonic()

    def start(self, total_epochs: int, steps_per_epoch: int, first_epoch: int = 1) -> None:
        self.total_epochs, self.steps_per_epoch = total_epochs, steps_per_epoch
        self.first_epoch = self.current = first_epoch

    def begin_epoch(self, epoch: int) -> None:
        self.current = epoch

    def step(self, done: int, loss: float | None, lr: float, images_per_s: float, peak_bytes: int) -> None:
        if time.monotonic() - self.told < PLAIN_EVERY_S:
            return
        self.told = time.monotonic()
        self._print(
            f"epoch {self.current}/{self.total_epochs} step {done}/{self.steps_per_epoch} {_step_facts(loss, lr, images_per_s, peak_bytes)}"
        )

    def epoch(self, row: EpochRow, best: bool) -> None:
        self.told = time.monotonic()
        if row.epoch == self.first_epoch:
            self._print(_EPOCH_HEADER)
        self._print(_epoch_line(row, self.total_epochs, best))

    def checking(self, done: int, total: int) -> None:
        self._files("checking images", done, total)

    def shrinking(self, done: int, total: int) -> None:
        self._files("shrinking images", done, total)

    def _files(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self.told >= PLAIN_EVERY_S:
            self.told = time.monotonic()
            self._print(f"{what}: {done} of {total}")

    def say(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}")

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self.console.print(escape(text), soft_wrap=True)


class LiveProgress:
    """A bar for the epoch that moves, with the lines of finished epochs above it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[facts]}"),
            console=console,
            expand=True,
            transient=True,
        )
        self.task: int | None = None
        self.total_epochs = self.steps_per_epoch = self.current = 0

    def start(self, total_epochs: int, steps_per_epoch: int, first_epoch: int = 1) -> None:
        self.total_epochs, self.steps_per_epoch = total_epochs, steps_per_epoch
        self.console.print(f"[bold]{_EPOCH_HEADER}[/]")
        self._replace_task("")

    def begin_epoch(self, epoch: int) -> None:
        self.current = epoch
        self._replace_task(f"epoch {epoch}/{self.total_epochs}", self.steps_per_epoch)

    def step(self, done: int, loss: float | None, lr: float, images_per_s: float, peak_bytes: int) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=done, facts=_step_facts(loss, lr, images_per_s, peak_bytes))

    def epoch(self, row: EpochRow, best: bool) -> None:
        style = "bold green" if best else ""
        self.console.print(_epoch_line(row, self.total_epochs, best), style=style, markup=False)

    def checking(self, done: int, total: int) -> None:
        self._files("checking images", done, total)

    def shrinking(self, done: int, total: int) -> None:
        self._files("shrinking images", done, total)

    def _files(self, what: str, done: int, total: int) -> None:
        if self.task is None:
            self._replace_task(what, total)
        assert self.task is not None
        self.bars.update(self.task, completed=done)
        if done >= total:
            self.close()

    def say(self, text: str) -> None:
        self.console.print(self._wrapped(text), markup=False)

    def warn(self, text: str) -> None:
        self.console.print(escape(self._wrapped(f"warning: {text}")).replace("warning:", "[yellow]warning:[/]", 1))

    def _wrapped(self, text: str) -> str:
        """Lines no wider than the terminal; what continues a line is indented below it."""
        lines = []
        for line in text.splitlines():
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            lines += textwrap.wrap(line, self.console.width, subsequent_indent=indent, break_on_hyphens=False) or [""]
        return "\n".join(lines)

    def close(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None
        self.bars.stop()

    def _replace_task(self, description: str, total: int | None = None) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        self.task = self.bars.add_task(description, total=total, facts="")
        self.bars.start()


def _step_facts(loss: float | None, lr: float, images_per_s: float, peak_bytes: int) -> str:
    told = "" if loss is None else f"loss {loss:.3f}  "
    return f"{told}lr {lr:.2g}  {images_per_s:.0f} img/s  peak {format_size(peak_bytes)}"


_EPOCH_HEADER = f"{'epoch':>8}  {'loss':>7}  val loss  accuracy  {'lr':>7}  img/s  {'peak':>9}  {'time':>7}"


def _epoch_line(row: EpochRow, total_epochs: int, best: bool) -> str:
    return (
        f"{f'{row.epoch}/{total_epochs}':>8}  {row.train_loss:>7.4f}  {row.val_loss:>8.4f}  {row.val_accuracy:>8.4f}  {row.lr:>7.2g}  "
        f"{row.images_per_s:>5.0f}  {format_size(row.peak_bytes):>9}  {f'{row.seconds:.1f} s':>7}{'  best' if best else ''}"
    )
