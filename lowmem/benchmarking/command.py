"""From what the user typed to the file and the page of a bench."""

import platform
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from lowmem.benchmarking.cases import budgets_meant, devices_meant, rows_for
from lowmem.benchmarking.compare import compare
from lowmem.benchmarking.compare_page import calibration_lines, comparison_page, terminal_table
from lowmem.benchmarking.page import write_bench_report
from lowmem.benchmarking.result import SYNTHETIC, BenchFile, Row
from lowmem.benchmarking.rounds import in_fresh_process, measure_in_turn, visitor_for
from lowmem.benchmarking.station import Work
from lowmem.benchmarking.table import bench_table
from lowmem.data.folder import embedded_images, open_dataset
from lowmem.data.prepared import open_cache, with_prepared
from lowmem.disk import writing
from lowmem.errors import LowmemError
from lowmem.machine import Machine, describe, this_machine
from lowmem.memory.housekeeping import freeze_garbage, prepare_allocator, thaw_garbage
from lowmem.recipe import Recipe, load_recipe
from lowmem.results.page import write_page

DEFAULT_CLASSES, DEFAULT_IMAGES = 100, 20_700
CARD_RECIPE, CPU_RECIPE = "seresnextaa101d_32x8d", "quickstart"
EXIT_STOPPED, EXIT_NOTHING = 130, 2


@dataclass(frozen=True)
class BenchRequest:
    """The options of `lowmem bench`. `data`: synthetic, embedded or a folder."""

    recipe: str | None = None
    budgets: str | None = None
    devices: str = "all"
    data: str = SYNTHETIC
    num_images: int | None = None
    minutes: float = 10.0
    overrides: tuple[str, ...] = ()
    out: Path | None = None


def run_bench(request: BenchRequest, console: Console) -> int:
    """Measure, and keep the file up to date after every visit; returns the exit code. Raises LowmemError before the first step."""
    prepare_allocator()
    deadline = time.monotonic() + 60 * request.minutes
    devices, budgets = devices_meant(request.devices), budgets_meant(request.budgets)
    recipe_name = request.recipe or (CPU_RECIPE if all(device.type == "cpu" for device in devices) else CARD_RECIPE)
    recipe = load_recipe(recipe_name, (*request.overrides, "model.weights=none"))
    work, data, num_images = _work(request, recipe)
    machine, out = this_machine(), _out(request.out)
    say = _sayer(console)
    say(f"{recipe.model.name}, batch {recipe.batch.size} at {recipe.data.train_px} px, on {describe(machine)}")
    rows = [row for device in devices for row in _rows(recipe, device, machine, budgets, work.num_classes, num_images)]
    bench = _bench_file(machine, recipe_name, recipe, work, data, num_images, rows)
    bench, stopped = _measured(bench, work, deadline, out, console)
    page = write_bench_report(out)
    console.print(bench_table(bench))
    say(f"Bench: {out}   Report: {page}")
    if stopped:
        say("Stopped before every time was stable; the file has what was measured.")
        return EXIT_STOPPED
    return 0 if any(row.outcome == "measured" for row in bench.rows) else EXIT_NOTHING


def _rows(recipe: Recipe, device: torch.device, *rest: Any) -> list[Row]:
    """Planning asks a card what is free, which takes a context: on the card, that is a process of its own."""
    return (
        rows_for(recipe, device, *rest) if device.type == "cpu" else in_fresh_process(rows_for, recipe, device, *rest)
    )


def _measured(bench: BenchFile, work: Work, deadline: float, out: Path, console: Console) -> tuple[BenchFile, bool]:
    """The bench with its rounds, kept in `out` after every visit, and whether the user stopped it."""
    current = [bench]
    live = Live(bench_table(bench), console=console, transient=True) if console.is_terminal else nullcontext()
    say = _sayer(console)

    def told(rows: list[Row], round_number: int) -> None:
        if not console.is_terminal and round_number != max(len(row.rounds) for row in current[0].rows):
            say(f"round {round_number}")
        current[0] = bench.model_copy(update={"rows": tuple(rows)})
        current[0].save(out)
        if isinstance(live, Live):
            live.update(bench_table(current[0]))

    with writing(out, "the bench"), live:
        bench.save(out)
        freeze_garbage()
        try:
            with closing(visitor_for(work, list(bench.rows))) as visitor:
                measure_in_turn(list(bench.rows), visitor, deadline, told)
            current[0] = current[0].model_copy(update={"finished": True})
        except KeyboardInterrupt:
            return current[0], True
        finally:
            thaw_garbage()
            current[0].save(out)
    return current[0], False


def _work(request: BenchRequest, recipe: Recipe) -> tuple[Work, str, int]:
    """What is trained, where its images come from, and how many images an epoch has."""
    if request.data == SYNTHETIC:
        return Work(recipe, DEFAULT_CLASSES), SYNTHETIC, request.num_images or DEFAULT_IMAGES
    root = embedded_images() if request.data == "embedded" else Path(request.data)
    dataset = open_dataset(root.resolve(), recipe.data.val_fraction, recipe.seed)
    if recipe.data.max_side:
        dataset = with_prepared(dataset, recipe.data.max_side, open_cache())
    if len(dataset.train) < recipe.batch.size:
        raise LowmemError(
            f"--data {request.data}: {len(dataset.train)} training images are fewer than one batch of {recipe.batch.size}."
        )
    return Work(recipe, len(dataset.classes), dataset.train), request.data, request.num_images or len(dataset.train)


def _bench_file(
    machine: Machine, recipe_name: str, recipe: Recipe, work: Work, data: str, num_images: int, rows: list[Row]
) -> BenchFile:
    return BenchFile(
        command=" ".join(["lowmem", *sys.argv[1:]]),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        cudnn=torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        torch_threads=_torch_threads(rows),
        recipe_name=recipe_name,
        recipe=recipe,
        num_classes=work.num_classes,
        num_images=num_images,
        data=data,
        rows=tuple(rows),
    )


def _torch_threads(rows: list[Row]) -> int:
    """What the plans say, or torch's choice."""
    return max((row.plan.loader.torch_threads for row in rows if row.plan), default=0) or torch.get_num_threads()


def _out(out: Path | None) -> Path:
    """The file to write: never one that is there."""
    if out is None:
        return Path(f"bench-{platform.node() or 'here'}-{datetime.now():%Y%m%d-%H%M%S}.json")
    if out.suffix != ".json":
        raise LowmemError(f"--out {out}: the name must end in .json; the report goes beside it as .html.")
    if out.exists():
        raise LowmemError(f"--out {out}: the file is there already. Give another name, or remove it.")
    if not out.parent.is_dir():
        raise LowmemError(f"--out {out}: there is no folder {out.parent}.")
    return out


def _sayer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(escape(text), highlight=False, soft_wrap=True)


def run_compare(files: list[Path], num_images: int | None, devices: str | None, out: Path, console: Console) -> None:
    """Print the comparison and write its page; raises LowmemError where the files cannot be compared."""
    if out.suffix != ".html":
        raise LowmemError(f"--out {out}: the name must end in .html.")
    others = None if devices is None else [] if devices == "none" else [name.strip() for name in devices.split(",")]
    with console.status("Predicting the devices that were not measured ..."):
        found = compare(files, num_images, others)
    with writing(out, "the report"):
        page = write_page(comparison_page(found), out)
    console.print(terminal_table(found))
    say = _sayer(console)
    for line in calibration_lines(found):
        say(line)
    say(f"Report: {page}")
