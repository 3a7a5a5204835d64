"""Everything in lowmem that needs a CUDA card, in one command of at most 10 minutes, with one JSON out.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --smoke --out /tmp/smoke.json      # the same code at tiny size; measures nothing of worth

In this order, each part a list or a table of the report:
- tests: `pytest -m cuda`.
- rows: for each model and budget the predicted peak beside the measured one (allocated, reserved, and the process as NVML sees it),
  step time by CUDA events and the wall clock in turn with the unconstrained run, and the time of its kernels alone; then the memory
  again while another process holds the rest of the card (`held_down`), since cuDNN chooses its workspaces by free memory.
- execution: steps as they are, compiled, and replayed as CUDA graphs, in the largest budget.
- timm: timm's own loop with and without its grad checkpointing.
- photographs: how long the steps of a real run wait for images.
- sameness: plans under deterministic algorithms, tensor by tensor.
- calibration: fitted to half of the models and checked on the others; `--keep` puts it into the user's cache, where planning finds it.

The budget is enforced by the allocator's limit; the card's settings stay as they are. Exit code 0: ran; 1: something failed; 4: no
CUDA card.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_measure import NUM_CLASSES, Bench, Size, measured_rows, memory_rows_of_small_cards
from gpu_peers import photo_run, timm_rows

from lowmem.errors import LowmemError
from lowmem.machine import this_machine
from lowmem.memory.housekeeping import prepare_allocator
from lowmem.planning.calibration import check, fit, halves, installed_versions, keep_calibration, memory_rows
from lowmem.planning.devices import device_spec
from lowmem.planning.planner import make_plan
from lowmem.recipe import Recipe, load_recipe
from lowmem.sizes import GIB, MIB, format_size, short_size
from lowmem.training.model import initialised_model
from lowmem.training.trial import try_execution, ways_to_try
from lowmem.verification import verify

NO_CARD = 4
RECIPE = "seresnextaa101d_32x8d"
BUDGETS = tuple(gib * GIB for gib in (16, 8, 6, 4, 3, 2))
CASES = (("seresnextaa101d_32x8d", 224), ("resnet50", 224), ("seresnextaa101d_32x8d", 288))


@dataclass
class Session:
    """One run of the benchmark."""

    device: torch.device
    smoke: bool
    out: Path
    deadline: float
    keep: bool
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> Size:
        return Size(rounds=2, steps=1) if self.smoke else Size()

    def cases(self) -> list[tuple[Recipe, list[int]]]:
        """Recipes with their budgets."""
        if self.smoke:
            recipe = recipe_for("test_resnet", 32, ("batch.size=4", "amp=fp32"))
            return [(recipe, _smoke_budgets(recipe, self.device))]
        return [(recipe_for(name, px), list(BUDGETS)) for name, px in CASES]


def main() -> int:
    session = parsed()
    if session is None:
        print("No CUDA card: nothing was run.")
        return NO_CARD
    prepare_allocator()
    command = " ".join([Path(sys.executable).name, *sys.argv])
    versions = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    session.report |= {"command": command, "machine": this_machine().model_dump(), **versions}
    session.report |= {"smoke": session.smoke, "size": asdict(session.size)}
    for name, part in PARTS.items():
        started = time.monotonic()
        part(session)
        session.report.setdefault("seconds", {})[name] = round(time.monotonic() - started, 1)
        session.out.parent.mkdir(parents=True, exist_ok=True)
        session.out.write_text(json.dumps(session.report, indent=1, default=str) + "\n", encoding="utf-8")
    print("\n".join(summary(session.report)))
    return int(any(_errors(session.report)))


def parsed() -> Session | None:
    """The session that was asked for; None where its card is not there."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this")
    options.add_argument("--device", default="cuda:0")
    options.add_argument("--smoke", action="store_true", help="a tiny model and one budget, to see that the code runs")
    options.add_argument("--keep", action="store_true", help="keep the calibration for plans on this machine")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    deadline = time.monotonic() + 60 * chosen.minutes
    return Session(device, chosen.smoke, chosen.out, deadline, chosen.keep)


def recipe_for(name: str, px: int, more: tuple[str, ...] = ()) -> Recipe:
    overrides = (f"model.name={name}", "model.weights=none", f"data.train_px={px}", "amp=bf16")
    return load_recipe(RECIPE, (*overrides, *more))


def run_tests(session: Session) -> None:
    if session.smoke:
        return
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-n", "0"], capture_output=True, text=True)
    session.report["tests"] = {"exit_code": done.returncode, "tail": done.stdout.splitlines()[-15:]}


def run_rows(session: Session) -> None:
    rows: list[dict[str, Any]] = []
    session.report["rows"] = rows
    for recipe, budgets in session.cases():
        if time.monotonic() < session.deadline:
            rows += measured_rows(recipe, session.device, budgets, session.size)
    for recipe, budgets in session.cases():
        if time.monotonic() < session.deadline:
            rows += memory_rows_of_small_cards(recipe, session.device, budgets)


def run_execution(session: Session) -> None:
    rows: list[dict[str, Any]] = []
    session.report["execution"] = rows
    for recipe, budgets in session.cases():
        if time.monotonic() < session.deadline:
            rows += _execution_rows(recipe, max(budgets), session.device)


def run_timm(session: Session) -> None:
    rows: list[dict[str, Any]] = []
    session.report["timm"] = rows
    for recipe, _ in session.cases():
        if time.monotonic() < session.deadline:
            rows += timm_rows(recipe, session.device, NUM_CLASSES, 1 if session.smoke else 8)


def run_photographs(session: Session) -> None:
    if time.monotonic() >= session.deadline:
        return
    recipe, budgets = session.cases()[0]
    px = recipe.data.train_px
    overrides = (
        f"model.name={recipe.model.name}", "model.weights=none", f"data.train_px={px}", f"data.val_px={px}", f"data.test_px={px}",
        f"batch.size={recipe.batch.size}", f"amp={recipe.amp}", "schedule.epochs=2",
    )  # fmt: skip
    vram = short_size(max(budgets)) if session.smoke else "8G"
    with tempfile.TemporaryDirectory() as scratch:
        session.report["photographs"] = photo_run(
            Path(scratch), session.device, overrides, vram, num_images=40 if session.smoke else 2000
        )


def run_sameness(session: Session) -> None:
    rows: list[dict[str, Any]] = []
    session.report["sameness"] = rows
    recipe, budgets = session.cases()[1 if not session.smoke else 0]
    for budget in budgets:
        if time.monotonic() < session.deadline:
            rows.append(
                {"model": recipe.model.name, "budget_bytes": budget} | _sameness(recipe, budget, session.device)
            )


def run_calibration(session: Session) -> None:
    rows = memory_rows(session.report)
    fitted, held_out = halves(rows)
    if session.device.type != "cuda" or not held_out:
        session.report["calibration"] = None
        return
    name, versions = torch.cuda.get_device_name(session.device), installed_versions()
    trial = fit(fitted, name, versions)
    session.report["calibration"] = {
        "fitted_to_half": trial.model_dump(),
        "check_on_the_others": asdict(check(trial, held_out)),
        "fitted_to_all": (whole := fit(rows, name, versions)).model_dump(),
    }
    if session.keep:
        session.report["calibration"]["kept_in"] = str(keep_calibration(whole))


PARTS: dict[str, Callable[[Session], None]] = {
    "tests": run_tests,
    "rows": run_rows,
    "execution": run_execution,
    "timm": run_timm,
    "photographs": run_photographs,
    "sameness": run_sameness,
    "calibration": run_calibration,
}


def _execution_rows(recipe: Recipe, budget: int, device: torch.device) -> list[dict[str, Any]]:
    case = {"model": recipe.model.name, "px": recipe.data.train_px, "budget_bytes": budget}
    try:
        plan = make_plan(recipe, device_spec(device), str(device), budget, num_classes=NUM_CLASSES, num_train=1000)
        model, _ = initialised_model(recipe.model, NUM_CLASSES, recipe.seed)
        ways = ways_to_try(model, recipe) if device.type == "cuda" else ("none",)
        trials = try_execution(model, recipe, plan, NUM_CLASSES, ways)
    except (LowmemError, RuntimeError) as error:
        return [case | {"error": str(error).splitlines()[0]}]
    return [case | asdict(trial) | {"step_s": trial.step_s if not trial.failure else None} for trial in trials]


def _sameness(recipe: Recipe, budget: int, device: torch.device) -> dict[str, Any]:
    try:
        plan = make_plan(recipe, device_spec(device), str(device), budget, num_classes=NUM_CLASSES, num_train=1000)
        found = verify(recipe, plan, NUM_CLASSES, steps=3)
    except (LowmemError, RuntimeError) as error:
        return {"error": str(error).splitlines()[0]}
    return {
        "claim": plan.exactness,
        "holds": found.holds,
        "differing": found.num_differing,
        "of": found.num_entries,
        "nondeterministic": list(found.warnings),
    }


def _smoke_budgets(recipe: Recipe, device: torch.device) -> list[int]:
    """One that is enough for everything, and one that is not."""
    bench = Bench(recipe, device)
    bench.use(bench.reference)
    peak = bench.engine.enforcement.peak_bytes
    bench.close()
    return [2 * peak, int(0.97 * peak)] if device.type == "cpu" else [2 * GIB]


def _errors(report: dict[str, Any]) -> list[str]:
    rows = [*report["rows"], *report["execution"], *report["timm"], *report["sameness"], report.get("photographs") or {}]
    found = [row["error"] for row in rows if row.get("error") and "too small" not in row["error"]]
    found += [f"{row['model']}: not the same classifier" for row in report["sameness"] if row.get("holds") is False]
    return found + (["tests"] if report.get("tests", {}).get("exit_code", 0) not in (0, 5) else [])


def summary(report: dict[str, Any]) -> list[str]:
    """The report in lines for people."""
    lines = [_row_line(row) for row in report["rows"]]
    for row in report["execution"]:
        took = row.get("error") or row["failure"] or f"{1000 * row['step_s']:.0f} ms a step"
        lines.append(f"{row['model']} {row['px']} px, compiled {row.get('compiled', '')}: {took}")
    for row in report["timm"]:
        kind = "timm with grad checkpointing" if row["grad_checkpointing"] else "timm"
        took = row.get("error") or f"{1000 * row['step_s']:.0f} ms a step"
        lines.append(f"{row['model']} {row['px']} px, {kind}: {took}")
    photographs = report.get("photographs") or {}
    if "stall_frac" in photographs:
        lines.append(
            f"photographs: {photographs['images_per_s']:.0f} images/s, {photographs['stall_frac']:.1%} waiting for images"
        )
    for row in report["sameness"]:
        lines.append(
            f"same classifier, {row['model']} in {short_size(row['budget_bytes'])}: {row.get('error') or row['holds']}"
        )
    if report.get("calibration"):
        lines.append(f"calibration: {report['calibration']['check_on_the_others']}")
    return lines


def _row_line(row: dict[str, Any]) -> str:
    name = f"{row['model']} {row['px']} px in {short_size(row['budget_bytes'])}{', card filled' if row['held_down'] else ''}"
    if row["error"]:
        return f"{name}: {row['error']}"
    gap = row["allocated_bytes"] / max(1, row["predicted_bytes"]) - 1
    line = f"{name}: allocated {format_size(row['allocated_bytes'])} ({gap:+.1%} of the prediction), reserved {row['reserved_bytes'] / MIB:.0f} MiB"
    if not row["event_s"]:
        return line
    kernels = f", kernels {1000 * row['kernel_s']:.0f} ms" if row["kernel_s"] else ""
    return f"{line}, step {1000 * median(row['event_s']):.0f} ms{kernels}, {row['overhead']:+.1%} over the unconstrained run"


if __name__ == "__main__":
    sys.exit(main())
