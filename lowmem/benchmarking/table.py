"""The rows of a bench as text, for the terminal and for the page."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lowmem.benchmarking.result import BenchFile, Row
from lowmem.benchmarking.statistics import Spread
from lowmem.sizes import format_size, short_size

HEADS = ("device", "budget", "s/step", "middle half", "n", "images/s", "epoch", "peak", "predicted", "J/image", "per pass", "run again", "on host", "optimizer")  # fmt: skip


TERMINAL = (
    "device",
    "budget",
    "s/step",
    "n",
    "images/s",
    "epoch",
    "peak",
    "J/image",
    "per pass",
    "run again",
    "optimizer",
)
"""What fits into 80 columns; the page has the rest."""


def bench_table(bench: BenchFile) -> Table:
    """For the terminal; devices are named where there are several."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    columns = [HEADS.index(head) for head in TERMINAL if is_shown(head, bench)]
    for number in columns:
        table.add_column(HEADS[number], justify="left" if number == 0 else "right", no_wrap=True)
    for row in bench.rows:
        cells = row_cells(row, bench)
        table.add_row(*(cells[number] for number in columns))
    if any(row.rounds and not row.is_stable for row in bench.rows):
        table.caption = "* not known to 2 % yet"
    return table


def row_cells(row: Row, bench: BenchFile) -> tuple[str, ...]:
    """One row's cells, in the order of HEADS."""
    start = (row.device, short_size(row.budget_bytes))
    if row.outcome in ("refused", "failed"):
        return (*start, "does not fit" if row.outcome == "refused" else "failed", *[""] * (len(HEADS) - 3))
    if row.outcome == "pending" or row.plan is None:
        return (*start, "waits", *[""] * (len(HEADS) - 3))
    joules = row.joules_per_image(bench.recipe.batch.size)
    prediction = row.plan.prediction
    return (
        *start,
        f"{row.step_s.median:.3f}",
        middle_half(row.step_s),
        str(row.step_s.n) + ("" if row.is_stable else "*"),
        f"{bench.recipe.batch.size / row.step_s.median:.1f}",
        duration(bench.epoch_s(row)),
        format_size(row.memory.peak_bytes),
        format_size(prediction.peak.total) if prediction else "",
        "" if joules is None else f"{joules:.2f}",
        str(row.plan.micro_batch),
        f"{row.plan.num_recomputed}/{row.plan.num_blocks}",
        format_size(prediction.host_bytes) if prediction and prediction.host_bytes else "-",
        row.plan.optimizer.replace("_", ", "),
    )


def middle_half(found: Spread) -> str:
    return f"{found.low:.3f}-{found.high:.3f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def is_shown(head: str, bench: BenchFile) -> bool:
    """Whether a column says anything in this bench."""
    if head == "device":
        return len({row.device for row in bench.rows}) > 1
    if head == "J/image":
        return any(each.joules is not None for row in bench.rows for each in row.rounds)
    return True
