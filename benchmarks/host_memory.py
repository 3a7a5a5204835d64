"""Host memory: what a loader's worker takes, and what whole runs take beside what a plan with --ram predicts.

    python benchmarks/host_memory.py --out benchmarks/results/host_memory.json

Memory is the proportional set size (PSS) of a process and all its children, sampled some 20 times a second, at its most; mapped files
(libraries) count once and whole, whoever else on the computer uses them. On systems without PSS it is the USS. A worker's own is a quarter of what four add to one, at several sizes of photographs; the line through them gives the
bytes of a worker and its share of a photograph as it is decoded. Runs are one epoch of `lowmem train --ram 16G`, each a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
from PIL import Image

from lowmem.machine import this_machine
from lowmem.planning.plan import load_plan
from lowmem.sizes import MIB

PHOTOS = {"small": (500, 375), "large": (2000, 1500), "12 megapixels": (4000, 3000)}
FEW, MANY = 1, 5
WORKER = """
import sys, time, torch
from pathlib import Path
from lowmem.data.folder import labelled_images
from lowmem.data.loader import Loader
from lowmem.data.pixels import TrainPixels
from lowmem.planning.plan import LoaderPlan
from lowmem.recipe import load_recipe
torch.set_num_threads(1)
folder, kind, workers, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
split = labelled_images(Path(folder), ("0", "1"))
pixels = TrainPixels(split, load_recipe("seresnextaa101d_32x8d").augment, 224, 0)
ends = time.monotonic() + seconds
with Loader(split, pixels, 224, 16, LoaderPlan(kind=kind, workers=workers, prefetch_batches=2), 0) as loader:
    while time.monotonic() < ends:
        for batch in loader.batches(1):
            pass
import os
os._exit(0)  # the end of an interpreter with torch touches 100 MiB of libraries
"""
TINY = ("model.weights=none", "schedule.epochs=1", "data.train_px=64", "data.val_px=64", "batch.size=16", "amp=fp32")
RUNS = {
    "resnet18, in line": ("resnet18", "small", ("--loader", "inline")),
    "resnet18, 2 threads": ("resnet18", "small", ("--loader", "threads", "--workers", "2")),
    "resnet18, 2 processes": ("resnet18", "small", ("--loader", "processes", "--workers", "2")),
    "resnet18, 4 processes, 12 megapixels": (
        "resnet18", "12 megapixels", ("--loader", "processes", "--workers", "4")
    ),
    "resnet18 in 140M": ("resnet18", "small", ("--loader", "threads", "--workers", "1", "--vram", "140M")),
    "efficientnet_lite0 at 128 px": (
        "tf_efficientnet_lite0", "small", ("--loader", "threads", "--workers", "1", "--set", "data.train_px=128", "--set", "data.val_px=128")
    ),
}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/host_memory.json"))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--only", choices=("workers", "runs"))
    options.add_argument("--match", default="", help="of the runs, those whose name holds this")
    chosen = options.parse_args()
    facts = {"command": "python " + " ".join(sys.argv), "machine": this_machine().model_dump(), "pillow": version("pillow")}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {size: make_photos(Path(scratch) / size.split()[0], pixels) for size, pixels in PHOTOS.items()}
        if chosen.only != "runs":
            keep(chosen.out, "workers", facts | {"photographs": PHOTOS, "found": workers(folders, chosen.rounds, chosen.seconds)})
        names = [] if chosen.only == "workers" else [name for name in RUNS if chosen.match in name]
        for name in names:
            keep(chosen.out, name, facts | {"n": 1} | run(name, folders, Path(tempfile.mkdtemp(dir=scratch)) / "run"))


def keep(out: Path, name: str, found: dict[str, object]) -> None:
    """Put a result into the file, in place of an earlier one of that name."""
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    report[name] = found
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(name, json.dumps(found), flush=True)


def make_photos(folder: Path, size: tuple[int, int]) -> Path:
    """Two classes of 32 photographs: parts of real ones, enlarged."""
    from skimage import data

    whole = Image.fromarray(data.astronaut())
    for number in range(64):
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        source = folder / str(number % 2) / f"{number % 4}.jpg"
        if number < 4:
            whole.crop((number * 10, 0, 400 + number * 10, 300)).resize(size, Image.Resampling.BICUBIC).save(path)
        else:
            os.link(source, path)
    return folder


def workers(folders: dict[str, Path], rounds: int, seconds: float) -> dict[str, object]:
    found: dict[str, object] = {}
    for kind in ("threads", "processes"):
        each = {}
        for size, folder in folders.items():
            rows = [[loader_bytes(folder, kind, number, seconds) for number in (FEW, MANY)] for _ in range(rounds)]
            each[size] = statistics.median((many - few) / (MANY - FEW) for few, many in rows)
        (small, large) = (3 * PHOTOS[size][0] * PHOTOS[size][1] for size in ("small", "12 megapixels"))
        share = (each["12 megapixels"] - each["small"]) / (large - small)
        found[kind] = {
            "n": rounds,
            "mib_each": {size: round(num_bytes / MIB, 1) for size, num_bytes in each.items()},
            "mib_without_photograph": round((each["small"] - share * small) / MIB, 1),
            "decoded_photographs": round(share, 2),
        }
    return found


def loader_bytes(folder: Path, kind: str, num_workers: int, seconds: float) -> int:
    return peak_bytes([sys.executable, "-c", WORKER, str(folder), kind, str(num_workers), str(seconds)])


def run(name: str, folders: dict[str, Path], out: Path) -> dict[str, object]:
    """One run to its end: what it took beside what its plan says."""
    model, size, options = RUNS[name]
    sets = [part for item in (f"model.name={model}", *TINY) for part in ("--set", item)]
    command = [sys.executable, "-m", "lowmem", "train", "--recipe", "resnet18", "--data", str(folders[size])]
    measured = peak_bytes([*command, "--ram", "16G", "--device", "cpu", "--out", str(out), *sets, *options])
    lines = load_plan(out / "plan.json").host.lines
    predicted = sum(line.num_bytes for line in lines)
    return {
        "predicted_mib": round(predicted / MIB, 1),
        "measured_mib": round(measured / MIB, 1),
        "predicted_over_measured": round(predicted / measured, 3),
        "lines_mib": {line.what: round(line.num_bytes / MIB, 1) for line in lines},
    }


def peak_bytes(command: list[str]) -> int:
    """The most that a command's processes take together."""
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    most = 0
    while process.poll() is None:
        most = max(most, tree_bytes(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(process.stderr.read())
    return most


def tree_bytes(pid: int) -> int:
    """Of a process and all below it."""
    shares, files = [0], [0]
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(OSError, psutil.Error, StopIteration):  # it has just ended
                share, mapped = process_bytes(process)
                shares.append(share)
                files.append(mapped)
    return sum(shares) + max(files)


def process_bytes(process: psutil.Process) -> tuple[int, int]:
    """(proportional share of anonymous and shared memory, mapped files); the USS and 0 where the system does not tell."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():
        return process.memory_full_info().uss, 0
    lines = rollup.read_text(encoding="ascii").splitlines()
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
    mapped = next(kib(line) for line in status if line.startswith("RssFile:"))
    return sum(kib(line) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))), mapped


def kib(line: str) -> int:
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
