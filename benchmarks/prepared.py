"""What shrinking photographs once gains and costs: rate, fidelity, time to prepare, second start.

    python benchmarks/prepared.py --out benchmarks/results/prepared.json

Photographs of 2000 x 1500 px, as loader.py makes them, under the recipe's augmentation at 224 px. Rates are images per CPU second of one
thread, medians over rounds in which every size has its turn. Fidelity is the peak signal-to-noise ratio of an augmented image against
the same draws on the original; `gradient` is the energy of its differences between neighbouring pixels as a share of the original's.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from loader import NUM_PHOTOS, PX, SIZES, make_photos

from lowmem.data.folder import labelled_images
from lowmem.data.pixels import TrainPixels
from lowmem.data.prepared import prepared_keys
from lowmem.data.shrunk import GAP, QUALITY, SUBSAMPLING, Cache, PreparedImages
from lowmem.data.split import Split
from lowmem.machine import this_machine, usable_cores
from lowmem.recipe import load_recipe
from lowmem.sizes import GIB

RECIPE = "seresnextaa101d_32x8d"
MAX_SIDES = (257, 320, 448, 640, 896)
NUM_EPOCHS = 8


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/prepared.json"))
    options.add_argument("--rounds", type=int, default=5)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = measured(Path(scratch), chosen.rounds)
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


def measured(scratch: Path, rounds: int) -> dict[str, object]:
    make_photos(scratch / "large", "large")
    split = labelled_images(scratch / "large", ("0", "1"))
    rows, splits = {}, {0: split}
    for max_side in MAX_SIDES:
        splits[max_side], rows[max_side] = prepared(split, max_side, Cache(scratch / f"cache-{max_side}", GIB))
    rates = race(splits, rounds)
    rows = {0: {}} | rows
    for max_side, row in rows.items():
        row["images_per_cpu_s"] = round(statistics.median(rates[max_side]), 1)
        row["spread"] = [round(min(rates[max_side]), 1), round(max(rates[max_side]), 1)]
        row["faster_by"] = round(statistics.median(rates[max_side]) / statistics.median(rates[0]), 2)
        if max_side:
            row |= fidelity(split, splits[max_side])
    return {
        "command": "python " + " ".join(sys.argv),
        "machine": this_machine().model_dump(),
        "pillow": version("pillow"),
        "recipe": RECIPE,
        "px": PX,
        "rounds": rounds,
        "photographs": {"px": SIZES["large"], "quality": 90, "n": NUM_PHOTOS["large"]},
        "entries": {"quality": QUALITY, "subsampling": SUBSAMPLING, "decoded_at_least_at": GAP},
        "threads_that_prepare": usable_cores(),
        "by_max_side": {"as they are" if not max_side else str(max_side): row for max_side, row in rows.items()},
    }


def prepared(split: Split, max_side: int, cache: Cache) -> tuple[Split, dict[str, object]]:
    """The split read through a new cache, and what making it took."""
    names = list(split.names())
    began = time.perf_counter()
    keys_N = prepared_keys(split.root, names, max_side, cache)
    first_s = time.perf_counter() - began
    began = time.perf_counter()
    prepared_keys(split.root, names, max_side, cache)
    again_s = time.perf_counter() - began
    num_bytes = sum(path.stat().st_size for path in cache.folder.glob("??/*"))
    return replace(split, reader=PreparedImages(cache, max_side, keys_N)), {
        "prepare_s_per_1000": round(1000 * first_s / len(names), 2),
        "second_start_s_per_1000": round(1000 * again_s / len(names), 3),
        "kib_per_image": round(num_bytes / len(names) / 1024, 1),
    }


def pixels_of(split: Split) -> TrainPixels:
    return TrainPixels(split, load_recipe(RECIPE).augment, PX, 0)


def race(splits: dict[int, Split], rounds: int) -> dict[int, list[float]]:
    rates: dict[int, list[float]] = {max_side: [] for max_side in splits}
    for epoch in range(rounds + 1):
        for max_side, split in splits.items():
            pixels, began = pixels_of(split), time.thread_time()
            for index in range(len(split)):
                pixels(epoch, index)
            if epoch:  # the first round warms up
                rates[max_side].append(len(split) / (time.thread_time() - began))
    return rates


def fidelity(plain: Split, shrunk: Split) -> dict[str, object]:
    decibels, ratios = [], []
    for epoch in range(NUM_EPOCHS):
        for index in range(len(plain)):
            ours, theirs = (pixels_of(split)(epoch, index).astype(float) for split in (shrunk, plain))
            decibels.append(10 * math.log10(255**2 / max(1e-9, float(((ours - theirs) ** 2).mean()))))
            ratios.append(gradient_energy(ours) / max(1e-9, gradient_energy(theirs)))
    return {
        "n": len(decibels),
        "psnr_db_mean": round(statistics.mean(decibels), 1),
        "psnr_db_worst": round(min(decibels), 1),
        "gradient_mean": round(statistics.mean(ratios), 3),
        "gradient_worst": round(min(ratios), 3),
    }


def gradient_energy(image_HWC: np.ndarray) -> float:
    return float((np.diff(image_HWC, axis=0) ** 2).mean() + (np.diff(image_HWC, axis=1) ** 2).mean())


if __name__ == "__main__":
    main()
