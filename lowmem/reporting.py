"""`lowmem report`: any result that lowmem has written -> its HTML page, made again from what was saved."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowmem.benchmarking.page import write_bench_report
from lowmem.benchmarking.result import is_bench_file
from lowmem.disk import writing
from lowmem.errors import LowmemError
from lowmem.profiling.page import is_profile_folder, write_profile_report
from lowmem.results.report import write_report


@dataclass(frozen=True)
class Report:
    """A kind of result: how to know it, and what writes its page and returns the page's path."""

    what: str
    recognises: Callable[[Path], bool]
    write: Callable[[Path], Path]


REPORTS = (
    Report("a run folder", lambda path: (path / "recipe.toml").is_file(), write_report),
    Report("a profile's folder", is_profile_folder, write_profile_report),
    Report("a file of lowmem bench", is_bench_file, write_bench_report),
)
"""In the order in which they are asked."""


def report_of(path: Path) -> Path:
    """Write the page of a result; raises LowmemError where `path` is none."""
    if not path.exists():
        raise LowmemError(f"{path}: there is nothing there. Give {_kinds()}.")
    for report in REPORTS:
        if report.recognises(path):
            with writing(path, "the report"):
                return report.write(path)
    raise LowmemError(f"{path} is no result of lowmem. Give {_kinds()}.")


def _kinds() -> str:
    names = [report.what for report in REPORTS]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
