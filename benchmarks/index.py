"""What a large folder costs before the first step: the listing and its index, the check of every file, and the check of a second start.

    python benchmarks/index.py --files 100000 --checked 20000 --out benchmarks/results/index.json

The files are links to one small JPEG in 100 class folders. Memory is what the process has grown by, at its most and at the end.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from lowmem.data.folder import labelled_images
from lowmem.data.readable import check_files
from lowmem.machine import this_machine

CLASSES = 100
MIB = 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=100_000)
    options.add_argument("--checked", type=int, default=20_000)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/index.json"))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = Path(scratch) / "photos", Path(scratch) / "cache"
        make_files(root, chosen.files)
        split, index = watched(lambda: labelled_images(root, tuple(str(number) for number in range(CLASSES))))
        index["bytes_of_the_index"] = sum(array.nbytes for array in (split.packed_paths, split.offsets, split.labels))
        names = [split.name(number) for number in range(chosen.checked)]
        _, first = watched(lambda: check_files(root, names, None, cache))
        _, second = watched(lambda: check_files(root, names, None, cache))
    report = {
        "command": f"python benchmarks/index.py --files {chosen.files} --checked {chosen.checked}",
        "machine": this_machine().model_dump(),
        "index": {"files": chosen.files, **per_100_000(index, chosen.files)},
        "check": {"files": chosen.checked, **per_100_000(first, chosen.checked)},
        "second_check": {"files": chosen.checked, **per_100_000(second, chosen.checked)},
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("index", "check", "second_check")}, indent=1))


def make_files(root: Path, num_files: int) -> None:
    """Links to a file of which there are never more than a file system allows."""
    random = np.random.default_rng(0)
    for number in range(num_files):
        folder = root / str(number % CLASSES)
        if number < CLASSES:
            folder.mkdir(parents=True)
            pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"photo_{number:07d}.jpg")
        else:
            os.link(folder / f"photo_{number % CLASSES:07d}.jpg", folder / f"photo_{number:07d}.jpg")


def watched(work):
    """(its result, seconds by the clock and of CPU, MiB at most and at the end over the start)."""
    process, done, most = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch)
    thread.start()
    began, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    thread.join()
    left = process.memory_info().rss - start
    return result, {"seconds": seconds, "cpu_s": cpu_s, "peak_mib": max(most[0], left) / MIB, "left_mib": left / MIB}


def per_100_000(found: dict[str, float], num_files: int) -> dict[str, float]:
    """Seconds and index bytes for 100,000 files; memory as it was."""
    scale = 100_000 / num_files
    scaled = {"seconds", "cpu_s", "bytes_of_the_index"}
    return {
        f"{name}_per_100000" if name in scaled else name: round(value * (scale if name in scaled else 1), 2)
        for name, value in found.items()
    }


if __name__ == "__main__":
    main()
