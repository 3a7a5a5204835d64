"""Golden losses: the losses of the first 50 steps of three small recipes, to the last bit, so that a change that is not meant to change
the arithmetic shows where it does.

    python tools/make_golden.py            # write tests/golden/*.json again
    python tools/make_golden.py --check    # compare, and say where they part

Float32 sums depend on the instructions they are formed with: on one CPU, 12 to 33 of the 50 losses differ by up to 1e-6
between the plain kernels, AVX2 and the CPU's best. So torch, oneDNN and MKL are held to their plain kernels (ISA) and to one thread, before torch
is imported. So held, an AMD EPYC (torch 2.15.0) and an Intel Xeon with AVX-512 (torch 2.14.1 and 2.13.0) agree in every bit of the 150 losses:
the comparison is exact on any x86-64 processor under Linux with these torch versions. With other versions or systems it is to ROUGH, and
says so.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ISA = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "golden"
NUM_STEPS = 50
SAME_BITS_TORCH = ("2.13", "2.14", "2.15")
"""Versions that were seen to give the same bits."""
ROUGH = 1e-4
"""A hundred times what any two of the kernels above differ by."""
COMMON = (
    "model.weights=none",
    "data.train_px=32",
    "data.val_px=32",
    "data.test_px=32",
    "batch.size=8",
    "amp=fp32",
    "schedule.epochs=13",
)
RECIPES = {
    "resnet": (
        "model.name=test_resnet",
        "model.freeze_batchnorm=false",
        "mixup.prob=0.5",
        "model.dropout=0.2",
        "loss.class_weights=reciprocal",
    ),
    "convnext": ("model.name=test_convnext", "batch.norm_batch=4", "model.drop_path=0.1", "optimizer.clip_norm=1.0"),
    "efficientnet": (
        "model.name=test_efficientnet",
        "optimizer.lr=2e-4",
        "loss.label_smoothing=0.1",
        "augment.blur_prob=0.5",
        "augment.hue=0.1",
        "model.freeze_batchnorm=false",
    ),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    chosen = options.parse_args()
    os.environ.update(ISA)
    sys.path.insert(0, str(ROOT))
    versions, differences = found_versions(), []
    for name, overrides in RECIPES.items():
        losses, path = first_losses(overrides), FOLDER / f"{name}.json"
        if chosen.check:
            golden = json.loads(path.read_text(encoding="utf-8"))
            differences += [f"{name}: {text}" for text in compared(golden, versions, losses)]
        else:
            FOLDER.mkdir(exist_ok=True)
            facts = {"versions": versions, "isa": ISA, "overrides": [*COMMON, *overrides], "losses": losses}
            path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\n".join(differences) or "The losses are the golden ones." if chosen.check else f"Written: {FOLDER}")
    return 1 if differences else 0


def found_versions() -> dict[str, str]:
    from importlib.metadata import version

    from lowmem.machine import this_machine

    names = ("torch", "timm", "numpy", "pillow")
    found = {name: version(name).partition("+")[0] for name in names}
    where = {"system": platform.system(), "machine": platform.machine(), "processor": this_machine().processor}
    return found | where


def other_arithmetic(golden: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """The versions and facts of this machine that may change a bit, where they are not the golden ones."""
    return {
        name: value for name, value in found.items() if name != "processor" and not _same(name, golden[name], value)
    }


def _same(name: str, golden: str, found: str) -> bool:
    both_known = name == "torch" and all(text.rpartition(".")[0] in SAME_BITS_TORCH for text in (golden, found))
    return golden == found or both_known


def compared(golden: dict[str, Any], versions: dict[str, str], losses: list[str]) -> list[str]:
    """Where the losses part from the golden ones: exactly where the arithmetic is the same, roughly where it may not be."""
    other = other_arithmetic(golden["versions"], versions)
    pairs = [(float.fromhex(old), float.fromhex(new)) for old, new in zip(golden["losses"], losses, strict=True)]
    if other:
        print(f"Other than the golden ones: {other}; the losses are compared to {ROUGH}.")
    tolerance = ROUGH if other else 0.0
    parted = [step for step, (old, new) in enumerate(pairs) if not abs(old - new) <= tolerance]
    if not parted:
        return []
    old, new = pairs[parted[0]]
    return [f"{len(parted)} of {len(pairs)} losses differ, the first at step {parted[0]}: {new} instead of {old}"]


def first_losses(overrides: tuple[str, ...]) -> list[str]:
    """The losses of the first steps of the recipe on its images, as hexadecimal floats."""
    import torch

    from lowmem.data.folder import open_dataset
    from lowmem.planning.plan import LoaderPlan, Plan
    from lowmem.progress import open_progress
    from lowmem.recipe import load_recipe
    from lowmem.training.checkpoint import Checkpoints
    from lowmem.training.folder import RunFolder
    from lowmem.training.loop import train_epoch
    from lowmem.training.model import initialised_model
    from lowmem.training.start import assemble, first_run_state
    from tests.faults.harness import make_photos

    torch.set_num_threads(1)
    recipe = load_recipe("quickstart", (*COMMON, *overrides))
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        dataset = open_dataset(make_photos(Path(scratch) / "photos"), recipe.data.val_fraction, recipe.seed)
        plan = Plan(
            device="cpu", device_name="CPU", amp_dtype="fp32", micro_batch=recipe.batch.atom, loader=LoaderPlan(kind="inline", workers=0)
        )  # fmt: skip
        folder = RunFolder(Path(scratch) / "run")
        folder.path.mkdir()
        model, _ = initialised_model(recipe.model, len(dataset.classes), recipe.seed)
        state = first_run_state(recipe, dataset)
        progress = stack.enter_context(open_progress())
        checkpoints = Checkpoints(folder.checkpoints)
        run = assemble(stack, folder, checkpoints, recipe, plan, dataset, model, state, progress, (float("inf"), 0))
        while len(losses) < NUM_STEPS:
            train_epoch(run)
            losses += run.state.losses
            run.change(epoch=run.state.epoch + 1, step=0, losses=())
    return [loss.hex() for loss in losses[:NUM_STEPS]]


if __name__ == "__main__":
    sys.exit(main())
