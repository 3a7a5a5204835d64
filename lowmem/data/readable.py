"""Which files can be read: checked in parallel before training, remembered by path, size and time of change."""

import os
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from lowmem.data.decode import why_unreadable
from lowmem.machine import usable_cores

Tell = Callable[[int, int], None]
"""Called with (files done, files in all)."""
CHUNK = 256
Stamp = tuple[str, int, int]
"""Absolute path, size in bytes, time of change in ns."""


@dataclass(frozen=True)
class Checked:
    """`reasons`: name -> why it cannot be read, for the unreadable files only."""

    num_files: int
    reasons: dict[str, str]


def check_files(root: Path, names: list[str], tell: Tell | None = None, cache_dir: Path | None = None) -> Checked:
    """Check every file that is new or has changed since it was last checked."""
    memory = _Memory(cache_dir or Path(platformdirs.user_cache_dir("lowmem")))
    reasons: dict[str, str] = {}
    done = 0
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="lowmem-check") as pool:
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            stamps = [_stamp(root / name) for name in chunk]
            known = memory.recall(stamps)
            fresh = [index for index, stamp in enumerate(stamps) if stamp not in known]
            reasons_found = pool.map(why_unreadable, [root / chunk[index] for index in fresh])
            found = {index: reason or "" for index, reason in zip(fresh, reasons_found)}
            memory.learn((stamps[index], reason) for index, reason in found.items())
            for index, name in enumerate(chunk):
                reason = found.get(index, known.get(stamps[index], ""))
                if reason:
                    reasons[name] = reason
            done += len(chunk)
            if tell is not None:
                tell(done, len(names))
    memory.close()
    return Checked(len(names), reasons)


class _Memory:
    """An SQLite file beside no data; without one (a read-only home), everything is checked anew."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.table: sqlite3.Connection | None = sqlite3.connect(folder / "readable.sqlite", timeout=10)
            self.table.execute(
                "CREATE TABLE IF NOT EXISTS checked (path TEXT PRIMARY KEY, size INT, time INT, reason TEXT) WITHOUT ROWID"
            )
        except (OSError, sqlite3.Error):
            self.table = None

    def recall(self, stamps: list[Stamp]) -> dict[Stamp, str]:
        if self.table is None:
            return {}
        marks = ",".join("?" * len(stamps))
        try:
            rows = self.table.execute(
                f"SELECT path, size, time, reason FROM checked WHERE path IN ({marks})", [s[0] for s in stamps]
            )
            return {(path, size, time): reason for path, size, time, reason in rows}
        except sqlite3.Error:
            return {}

    def learn(self, found: Iterable[tuple[Stamp, str]]) -> None:
        if self.table is None:
            return
        try:
            with self.table:
                self.table.executemany(
                    "INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?)", [(*stamp, reason) for stamp, reason in found]
                )
        except sqlite3.Error:
            self.table = None

    def close(self) -> None:
        if self.table is not None:
            self.table.close()


def _stamp(path: Path) -> Stamp:
    try:
        facts = os.stat(path)
        return os.fsencode(path.absolute()).decode("utf-8", "replace"), facts.st_size, facts.st_mtime_ns
    except OSError:
        return str(path).encode("utf-8", "replace").decode(), -1, -1
