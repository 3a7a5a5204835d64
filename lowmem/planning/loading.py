"""How images are loaded: workers from what an image costs, the step's time and the cores."""

import math
import time
from collections.abc import Callable

import numpy as np

from lowmem.errors import LowmemError
from lowmem.machine import usable_cores
from lowmem.planning.devices import DeviceSpec
from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.recipe import Recipe

KINDS = ("auto", "inline", "threads", "processes")
NUM_TIMED, MAX_TIMED_S = 16, 1.0
HEADROOM = 1.25
"""Workers make so many times the images that the step needs, to even out images of unequal cost."""
MOST_WORKERS = 16
ASSUMED_IMAGE_S = 0.016
"""Where there are no images to time: a photograph of 2000 x 1500 px in the recipe's augmentation (benchmarks/results/loader.json)."""


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
