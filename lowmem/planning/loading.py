"""How images are loaded, and what that takes of the host: workers from what an image costs, the step's time and the cores; the host
budget line by line."""

import math
import time
from collections.abc import Callable

import numpy as np
import psutil

from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.planning.devices import DeviceSpec
from lowmem.planning.plan import BudgetLine, LoaderPlan, Plan
from lowmem.recipe import Recipe
from lowmem.sizes import MIB, format_size, short_size

KINDS = ("auto", "inline", "threads", "processes")
NUM_TIMED, MAX_TIMED_S = 16, 1.0
HEADROOM = 1.25
"""Workers make so many times the images that the step needs, to even out images of unequal cost."""
PROCESS_BYTES, THREAD_BYTES = 45 * MIB, 25 * MIB
"""A worker's own memory beside the shared one, with a decoded photograph in it (benchmarks/results/loader.json)."""
MOST_WORKERS = 16


def image_seconds(pixels: Callable[[int, int], np.ndarray], num_images: int) -> float:
    """CPU time of one training image, the mean of some spread over the split; the first is not counted."""
    pixels(0, 0)
    indices = np.linspace(0, num_images - 1, min(NUM_TIMED, num_images)).astype(int)
    began, done = time.thread_time(), 0
    for index in indices:
        pixels(0, int(index))
        done += 1
        if time.thread_time() - began > MAX_TIMED_S:
            break
    return (time.thread_time() - began) / done


def check_wish(kind: str, workers: int | None) -> None:
    """Raises LowmemError for a loader that there is not."""
    if kind not in KINDS:
        raise LowmemError(f"--loader {kind}: give {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    if workers is not None and not 0 <= workers <= 256:
        raise LowmemError(f"--workers {workers}: give a number from 0 (images loaded in line) to 256.")


def loader_for(
    plan: Plan, recipe: Recipe, spec: DeviceSpec, image_s: float, kind: str = "auto", workers: int | None = None
) -> tuple[LoaderPlan, str]:
    """The loader of a plan, and why, in a sentence; `kind` and `workers` are the user's wish. Raises LowmemError."""
    check_wish(kind, workers)
    cores = usable_cores()
    if kind == "inline" or workers == 0:
        return plan.loader.model_copy(
            update={"kind": "inline", "workers": 0, "max_workers": 0}
        ), "Images loaded in line: as asked."
    chosen = kind if kind != "auto" else "threads" if spec.kind == "cpu" else "processes"
    if workers is not None:
        loader = plan.loader.model_copy(update={"kind": chosen, "workers": workers, "max_workers": workers})
        return loader, f"{loader.in_words}: as asked."
    step_s = plan.prediction.step_s if plan.prediction else None
    cost = f"an image costs {1000 * image_s:.1f} ms of one core"
    if spec.kind == "cpu" or not step_s:
        loader = plan.loader.model_copy(update={"kind": chosen, "max_workers": plan.loader.workers})
        return loader, f"{loader.in_words}: {cost}, and the {cores} cores compute the steps as well."
    needed = math.ceil(HEADROOM * image_s * recipe.batch.size / step_s)
    most = max(1, min(MOST_WORKERS, cores - 1))
    loader = plan.loader.model_copy(update={"kind": chosen, "workers": max(1, min(needed, most)), "max_workers": most})
    asked = f"{cost}, a step takes {step_s:.3g} s for {recipe.batch.size}"
    short = f"; {needed} would be needed, so the device will wait" if needed > most else ""
    beside = " Processes leave Python's lock to the step." if chosen == "processes" else ""
    return loader, f"{loader.in_words} of at most {most}: {asked}{short}.{beside}"


def host_lines(plan: Plan, recipe: Recipe) -> list[BudgetLine]:
    """What a run takes of host memory, line by line: as it is now, and what loading, offloading and saving will add."""
    loader = plan.loader
    parallel = loader.kind != "inline"
    each = {"processes": PROCESS_BYTES, "threads": THREAD_BYTES, "inline": 0}[loader.kind]
    data = recipe.data
    batch_bytes = 3 * max(recipe.batch.size * data.train_px**2, plan.eval_batch * data.val_px**2)
    # A process fills shared memory, of which a batch is copied out; a thread fills the batch itself.
    num_batches = (loader.prefetch_batches if parallel else 1) + (2 if loader.kind == "processes" else 1)
    lines = [
        BudgetLine(what="this program", num_bytes=psutil.Process().memory_info().rss),
        BudgetLine(what=f"workers: {loader.in_words.lower()}", num_bytes=loader.workers * each),
        BudgetLine(
            what=f"{num_batches} batches of images{', pinned' if loader.pin_memory else ''}",
            num_bytes=num_batches * batch_bytes,
        ),
    ]
    if plan.prediction:
        lines.append(BudgetLine(what="offloaded tensors and optimizer", num_bytes=plan.prediction.host_bytes))
        lines.append(BudgetLine(what="the copy for checkpoints", num_bytes=3 * plan.prediction.peak.weights))
    if plan.device == "cpu" and plan.prediction:
        lines.append(BudgetLine(what="the step itself", num_bytes=plan.prediction.peak.total))
    return [line for line in lines if line.num_bytes]


def within_ram(plan: Plan, recipe: Recipe, ram_bytes: int) -> Plan:
    """The plan with as many workers and batches ahead as `--ram` leaves room for; raises LowmemError where none is."""
    loader, tried = plan.loader, plan
    for leaner in _leaner(loader):
        tried = plan.model_copy(update={"loader": leaner})
        if sum(line.num_bytes for line in host_lines(tried, recipe)) <= ram_bytes:
            if leaner == loader:
                return plan.model_copy(update={"reasons": (*plan.reasons, _host_in_words(plan, recipe, ram_bytes))})
            told = f"{leaner.in_words} instead of {loader.in_words[0].lower()}{loader.in_words[1:]}: --ram has no room for more."
            return tried.model_copy(update={"reasons": (*plan.reasons, told, _host_in_words(tried, recipe, ram_bytes))})
    lines = host_lines(tried, recipe)
    needed = sum(line.num_bytes for line in lines)
    listed = _listed(lines)
    raise LowmemError(
        f"--ram {short_size(ram_bytes)} is too small: the leanest way to load needs {format_size(needed)} ({listed}). "
        f"Use --ram {math.ceil(1.05 * needed / MIB)}M."
    )


def _host_in_words(plan: Plan, recipe: Recipe, ram_bytes: int) -> str:
    lines = host_lines(plan, recipe)
    needed = sum(line.num_bytes for line in lines)
    return f"Host memory: {format_size(needed)} of {format_size(ram_bytes)}: {_listed(lines)}."


def _listed(lines: list[BudgetLine]) -> str:
    return ", ".join(f"{line.what} {format_size(line.num_bytes)}" for line in lines)


def _leaner(loader: LoaderPlan) -> list[LoaderPlan]:
    """The loader and ever leaner ones: fewer batches ahead, fewer workers, none."""
    found = [loader]
    for prefetch in range(loader.prefetch_batches - 1, 0, -1):
        found.append(loader.model_copy(update={"prefetch_batches": prefetch}))
    for workers in range(loader.workers - 1, 0, -1):
        found.append(loader.model_copy(update={"prefetch_batches": 1, "workers": workers, "max_workers": workers}))
    inline = {"kind": "inline", "workers": 0, "max_workers": 0, "prefetch_batches": 1}
    return [*found, loader.model_copy(update=inline)]
