"""A tiny run, processes for it that start in a fraction of a second, and the comparison of what they leave.

Importing torch and timm takes seconds, so on Linux children are forked from a server that has imported them (multiprocessing's
forkserver); elsewhere each is spawned. Either way a child is a process with the whole command line in it.
"""

import csv
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image

from lowmem.planning.plan import LoaderPlan, Plan
from lowmem.verification import same_bits
from tests.faults.child import Fault, command

FORKSERVER = sys.platform.startswith("linux")
PRELOADED = ["lowmem.cli", "lowmem.training.resume", "lowmem.data.loader", "rich.progress", "safetensors.torch"]
TINY = (
    "model.name=test_resnet",
    "model.weights=none",
    "model.freeze_batchnorm=false",
    "model.head_init=timm",
    "data.train_px=32",
    "data.val_px=32",
    "data.test_px=32",
    "batch.size=8",
    "schedule.epochs=3",
    "amp=fp32",
    "augment.brightness=0.2",
    "mixup.prob=0.5",
    "model.dropout=0.2",
    "loss.class_weights=reciprocal",
)
STEPS_PER_EPOCH = 4
MEASURED_COLUMNS = {"seconds", "train_s", "eval_s", "wait_data_s", "images_per_s", "peak_bytes"}


def make_photos(root: Path) -> Path:
    """Three classes of noise: 32 training and 8 validation images of 40 px, as PNG."""
    random = np.random.default_rng(0)
    for label, (count, colour) in {"1": (12, 60), "2": (8, 120), "10": (20, 180)}.items():
        (root / label).mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(random.normal(colour, 50, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / label / f"{index}.png")
    return root


def make_plan_file(path: Path, workers: int = 0, **changes: Any) -> Path:
    # The order of sums on a CPU depends on the number of torch's threads, so a plan names it.
    # Two workers are threads, four are processes, so that both are stopped and resumed.
    kind = "inline" if not workers else "processes" if workers >= 4 else "threads"
    loader = LoaderPlan(kind=kind, workers=workers, torch_threads=1)
    fields = {
        "device": "cpu",
        "device_name": "CPU",
        "amp_dtype": "fp32",
        "micro_batch": 8,
        "eval_batch": 8,
        "loader": loader,
    }
    Plan(**(fields | changes)).save(path)
    return path


def train_arguments(photos: Path, plan: Path, out: Path, *overrides: str, every: str = "1-steps") -> list[str]:
    """`lowmem train` of the tiny recipe."""
    sets = [part for item in (*TINY, *overrides) for part in ("--set", item)]
    return [
        "train", "--data", str(photos), "--device", "cpu", "--out", str(out), "--plan", str(plan), "--checkpoint-every", every, *sets,
    ]  # fmt: skip


def resume_arguments(out: Path, *more: str, every: str = "1-steps") -> list[str]:
    return ["resume", str(out), "--checkpoint-every", every, *more]


@dataclass
class Child:
    """A running command."""

    process: Any
    output: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, timeout_s: float = 120) -> int:
        """The exit code, negative for a signal."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"the child hangs: {self.output.read_text(encoding='utf-8', errors='replace')}")
        return int(self.process.exitcode)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""


def start(arguments: list[str], output: Path, fault: Fault | None = None, max_file_bytes: int | None = None) -> Child:
    process = _context().Process(target=command, args=(arguments, str(output), fault, max_file_bytes), daemon=False)
    process.start()
    return Child(process, output)


def run(arguments: list[str], output: Path, fault: Fault | None = None, max_file_bytes: int | None = None) -> int:
    return start(arguments, output, fault, max_file_bytes).wait()


def wait_for(condition: Any, timeout_s: float = 60, what: str = "") -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


def end_state(out: Path) -> dict[str, Any]:
    """All that a run decides: tensors of its last checkpoint and of its classifier, and the figures of its epochs."""
    newest = sorted(path for path in (out / "checkpoints").iterdir() if not path.name.startswith("."))[-1]
    state: dict[str, Any] = {}
    for file in (
        newest / "model.safetensors",
        newest / "optimizer.safetensors",
        out / "classifier" / "model.safetensors",
    ):
        state |= {
            f"{file.parent.name[:3]}/{file.name}/{name}": t.clone()
            for name, t in safetensors.torch.load_file(file).items()
        }
    state = {name.partition("/")[2] if not name.startswith("cla") else name: value for name, value in state.items()}
    with open(out / "epochs.csv", newline="", encoding="utf-8") as rows:
        for row in csv.DictReader(rows):
            state |= {
                f"epoch {row['epoch']} {name}": value for name, value in row.items() if name not in MEASURED_COLUMNS
            }
    return state


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the entries that are not the same in both, bit for bit."""
    odd = sorted(set(a) ^ set(b))
    return odd + [name for name in a if name in b and not _same(a[name], b[name])]


def _same(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, str) else same_bits(a, b)


def _context() -> Any:
    if not FORKSERVER:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
