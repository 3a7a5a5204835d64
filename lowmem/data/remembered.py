"""What was found out about files, remembered by path, size and time of change in an SQLite file of the user's cache, never beside the
files."""

import os
import sqlite3
from collections.abc import Iterable
from pathlib import Path

Stamp = tuple[str, int, int]
"""Absolute path, size in bytes, time of change in ns."""


class Remembered:
    """A text for each file that was looked at; without a file of its own (a read-only home), nothing is remembered."""

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self.table: sqlite3.Connection | None = sqlite3.connect(file, timeout=10)
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
            return {(path, size, time): text for path, size, time, text in rows}
        except sqlite3.Error:
            return {}

    def learn(self, found: Iterable[tuple[Stamp, str]]) -> None:
        if self.table is None:
            return
        try:
            with self.table:
                self.table.executemany(
                    "INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?)", [(*stamp, text) for stamp, text in found]
                )
        except sqlite3.Error:
            self.table = None

    def close(self) -> None:
        if self.table is not None:
            self.table.close()


def stamp(path: Path) -> Stamp:
    """What says that a file is as it was; never that of another file where it cannot be read."""
    try:
        facts = os.stat(path)
        return os.fsencode(path.absolute()).decode("utf-8", "replace"), facts.st_size, facts.st_mtime_ns
    except OSError:
        return str(path).encode("utf-8", "replace").decode(), -1, -1
