"""What a new user gets: `lowmem train --vram 8G` on the embedded images, for three seeds.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Each run is the command line in a process of its own; the seconds are those of the whole command.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lowmem.machine import this_machine
from lowmem.results.history import read_history


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    options.add_argument("--seeds", type=int, default=3)
    chosen = options.parse_args()
    runs = [run(seed) for seed in range(chosen.seeds)]
    accuracies = [item["val_accuracy"] for item in runs]
    report = {
        "command": "lowmem train --vram 8G --set seed=N",
        "machine": this_machine().model_dump(),
        "n": len(runs),
        "mean_accuracy": statistics.mean(accuracies),
        "spread": [min(accuracies), max(accuracies)],
        "runs": runs,
    }
    chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"accuracy {report['mean_accuracy']:.4f} (from {min(accuracies):.4f} to {max(accuracies):.4f}, n = {len(runs)})"
    )


def run(seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        code = "from lowmem.cli import main; main()"
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code, "train", "--vram", "8G", "--set", f"seed={seed}", "--out", str(out)],
            check=True,
        )
        seconds = time.perf_counter() - started
        best = max(read_history(out / "epochs.csv"), key=lambda row: (row.val_accuracy, -row.val_loss))
    return {
        "seed": seed,
        "val_accuracy": best.val_accuracy,
        "val_loss": best.val_loss,
        "best_epoch": best.epoch,
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
