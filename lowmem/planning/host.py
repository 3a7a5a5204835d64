"""What a run takes of host memory, line by line, and the loader that `--ram` leaves room for.

The constants were measured with benchmarks/host_memory.py (benchmarks/results/host_memory.json), which also sets the sum beside what whole
runs took.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import psutil
from PIL import Image

from lowmem.data.split import Split
from lowmem.errors import LowmemError
from lowmem.planning.network import FakeNetwork
from lowmem.planning.plan import BudgetLine, HostBudget, LoaderPlan, Plan
from lowmem.planning.trace import trace_evaluation
from lowmem.recipe import Recipe
from lowmem.sizes import MIB, format_size, short_size

PROCESS_BYTES, THREAD_BYTES = 32 * MIB, 16 * MIB
"""A worker's own memory beside the shared one and a photograph: 24 to 30 and 6 to 10 MiB measured, and a margin for other libraries."""
PIXEL_BYTES = 4
"""Of an RGB image in Pillow."""
REDUCTIONS = (8, 4, 2)
"""Of JPEG's decoder."""
LATER_BYTES = 150 * MIB
"""Figures and the report, and the pages of libraries that are first touched when a process ends."""
NUM_LOOKED_AT = 32
ASSUMED_PHOTO_BYTES = PIXEL_BYTES * 2000 * 1500
"""12 megapixels at half their scale, where there are no images to look at."""


@dataclass(frozen=True)
class Needs:
    """What host memory hangs on beside plan and recipe: decoding a large photograph, the validation images of one batch, and the
    evaluation's peak on the device."""

    photo_bytes: int = ASSUMED_PHOTO_BYTES
    eval_batch: int | None = None
    evaluation_bytes: int = 0


def needs_of(
    plan: Plan, recipe: Recipe, num_classes: int, train: Split | None = None, num_val: int | None = None
) -> Needs:
    """Of a plan and its images, of which the headers of some are read."""
    eval_batch = plan.eval_batch if num_val is None else max(1, min(plan.eval_batch, num_val))
    evaluation = evaluation_bytes(plan, recipe, num_classes, eval_batch) if plan.device == "cpu" else 0
    photo = ASSUMED_PHOTO_BYTES if train is None else largest_photo_bytes(train, recipe)
    if recipe.data.max_side:
        photo = min(photo, PIXEL_BYTES * recipe.data.max_side**2)
    return Needs(photo, eval_batch, evaluation)


def largest_photo_bytes(split: Split, recipe: Recipe) -> int:
    """Bytes that decoding takes, at its most, among some images spread over the split; only headers are read."""
    indices = np.linspace(0, len(split) - 1, min(NUM_LOOKED_AT, len(split))).astype(int)
    sizes = [0]
    for index in indices:
        with (
            suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
            Image.open(split.path(int(index))) as image,
        ):
            sizes.append(decoded_bytes(image, recipe))
    return max(sizes)


def decoded_bytes(image: Image.Image, recipe: Recipe) -> int:
    """What decoding an image for the recipe takes: a JPEG's scale follows from the smallest crop (decode.resized_crop); a progressive
    one is held whole as coefficients, of which 4:2:0 has one and a half a pixel, in two bytes."""
    num_pixels = image.width * image.height
    if image.format != "JPEG":
        return PIXEL_BYTES * num_pixels
    augment = recipe.augment
    narrow = min(augment.crop_ratio[0], 1 / augment.crop_ratio[1])
    scale = math.sqrt(augment.crop_scale[0] * narrow * num_pixels) / recipe.data.train_px
    reduced = next((factor for factor in REDUCTIONS if scale >= factor), 1)
    coefficients = 3 * num_pixels if image.info.get("progressive") else 0
    return PIXEL_BYTES * num_pixels // reduced**2 + coefficients


def evaluation_bytes(plan: Plan, recipe: Recipe, num_classes: int, batch_size: int) -> int:
    """Peak of tensors in an evaluation, beside the optimizer's state."""
    network = FakeNetwork(recipe, num_classes, plan.memory_format)
    one, two = (trace_evaluation(network, plan, recipe.data.val_px, size) for size in (1, 2))
    held = plan.prediction.peak.optimizer + plan.prediction.peak.ema if plan.prediction else 0
    return one + (batch_size - 1) * (two - one) + held


def host_lines(plan: Plan, recipe: Recipe, needs: Needs) -> tuple[BudgetLine, ...]:
    """What a run takes of host memory, line by line: as it is now, and what loading, offloading and saving will add."""
    loader, data = plan.loader, recipe.data
    parallel = loader.kind != "inline"
    most = max(loader.workers, loader.max_workers)  # so many there may be while the device waits
    each = {"processes": PROCESS_BYTES, "threads": THREAD_BYTES, "inline": 0}[loader.kind]
    eval_batch = needs.eval_batch or plan.eval_batch
    batch_bytes = 3 * max(recipe.batch.size * data.train_px**2, eval_batch * data.val_px**2)
    # A process fills shared memory, of which a batch is copied out; a thread fills the batch itself.
    num_batches = (loader.prefetch_batches if parallel else 1) + (2 if loader.kind == "processes" else 1)
    num_photos = max(1, most) if parallel else 1
    lines = [
        BudgetLine(what="this program", num_bytes=psutil.Process().memory_info().rss),
        BudgetLine(what="what it loads later: figures, libraries at its end", num_bytes=LATER_BYTES),
        BudgetLine(what=f"workers: {_in_words(loader).lower()}", num_bytes=most * each),
        BudgetLine(
            what=f"{num_photos} decoded photograph{'s' if num_photos > 1 else ''}",
            num_bytes=num_photos * needs.photo_bytes,
        ),
        BudgetLine(
            what=f"{num_batches} batches of images{', pinned' if loader.pin_memory else ''}",
            num_bytes=num_batches * batch_bytes,
        ),
    ]
    if plan.prediction:
        peak = plan.prediction.peak
        lines.append(BudgetLine(what="offloaded tensors and optimizer", num_bytes=plan.prediction.host_bytes))
        lines.append(BudgetLine(what="the copy for checkpoints", num_bytes=3 * peak.weights + peak.ema))
        if plan.device == "cpu":
            step = max(peak.total, needs.evaluation_bytes)
            lines.append(BudgetLine(what="the step itself, or an evaluation", num_bytes=step))
    return tuple(line for line in lines if line.num_bytes)


def within_ram(plan: Plan, recipe: Recipe, ram_bytes: int, needs: Needs) -> Plan:
    """The plan with as many workers and batches ahead as `--ram` leaves room for, and its host memory line by line; raises
    LowmemError where none is."""
    loader = plan.loader
    for leaner in _leaner(loader):
        lines = host_lines(plan.model_copy(update={"loader": leaner}), recipe, needs)
        if _sum(lines) <= ram_bytes:
            asked = _in_words(loader)
            told = f"{_in_words(leaner)} instead of {asked[0].lower()}{asked[1:]}: --ram has no room for more."
            reasons = plan.reasons if leaner == loader else (*plan.reasons, told)
            host = HostBudget(total_bytes=ram_bytes, lines=lines)
            return plan.model_copy(update={"loader": leaner, "reasons": reasons, "host": host})
    needed = _sum(lines)
    listed = ", ".join(f"{line.what} {format_size(line.num_bytes)}" for line in lines)
    raise LowmemError(
        f"--ram {short_size(ram_bytes)} is too small: the leanest way to load needs {format_size(needed)} ({listed}). "
        f"Use --ram {math.ceil(1.05 * needed / MIB)}M."
    )


def planned_within_ram(
    make: Callable[[int], Plan], recipe: Recipe, ram_bytes: int, needs: Callable[[Plan], Needs]
) -> Plan:
    """What `make` gives for the host memory that it may offload to, within `ram_bytes` in all: where loading has no room beside the
    offloaded tensors, fewer are offloaded. Raises LowmemError."""
    plan = make(ram_bytes)
    try:
        return within_ram(plan, recipe, ram_bytes, needs(plan))
    except LowmemError:
        held = plan.prediction.host_bytes if plan.prediction else 0
        for tried in (plan, _leanest(plan)):
            left = held + ram_bytes - _sum(host_lines(tried, recipe, needs(plan)))
            with suppress(LowmemError):  # what --ram lacks is told, not what --vram lacks with less offloaded
                if left > 0:
                    less = make(left)
                    return within_ram(less, recipe, ram_bytes, needs(less))
        raise


def _sum(lines: Iterable[BudgetLine]) -> int:
    return sum(line.num_bytes for line in lines)


def _leanest(plan: Plan) -> Plan:
    return plan.model_copy(update={"loader": _leaner(plan.loader)[-1]})


def _in_words(loader: LoaderPlan) -> str:
    grows = loader.kind != "inline" and loader.max_workers > loader.workers
    return f"{loader.in_words}{f' of at most {loader.max_workers}' if grows else ''}"


def _leaner(loader: LoaderPlan) -> list[LoaderPlan]:
    """The loader and ever leaner ones: fewer workers that may be added, fewer batches ahead, fewer workers, none."""
    found = [loader]
    for most in range(loader.max_workers - 1, loader.workers - 1, -1):
        found.append(loader.model_copy(update={"max_workers": most}))
    for prefetch in range(loader.prefetch_batches - 1, 0, -1):
        found.append(found[-1].model_copy(update={"prefetch_batches": prefetch}))
    for workers in range(loader.workers - 1, 0, -1):
        found.append(loader.model_copy(update={"prefetch_batches": 1, "workers": workers, "max_workers": workers}))
    inline = {"kind": "inline", "workers": 0, "max_workers": 0, "prefetch_batches": 1}
    return [*found, loader.model_copy(update=inline)]
