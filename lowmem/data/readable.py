"""Which files can be read: checked in parallel before training, remembered by path, size and time of change."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from lowmem.data.decode import why_unreadable
from lowmem.data.remembered import Remembered, stamp
from lowmem.machine import usable_cores

Tell = Callable[[int, int], None]
"""Called with (files done, files in all)."""
CHUNK = 256


@dataclass(frozen=True)
class Checked:
    """`reasons`: name -> why it cannot be read, for the unreadable files only."""

    num_files: int
    reasons: dict[str, str]


def check_files(root: Path, names: list[str], tell: Tell | None = None, cache_dir: Path | None = None) -> Checked:
    """Check every file that is new or has changed since it was last checked."""
    memory = Remembered((cache_dir or Path(platformdirs.user_cache_dir("lowmem"))) / "readable.sqlite")
    reasons: dict[str, str] = {}
    done = 0
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="lowmem-check") as pool:
        for start in range(0, len(names), CHUNK):
            chunk = names[start : start + CHUNK]
            stamps = [stamp(root / name) for name in chunk]
            known = memory.recall(stamps)
            fresh = [index for index, seen in enumerate(stamps) if seen not in known]
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
