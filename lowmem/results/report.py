"""The report of a run: report.html in its folder, from whatever the run has written so far."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.planning.explain import plan_lines
from lowmem.planning.plan import Plan, load_plan
from lowmem.results.history import EpochRow, read_history
from lowmem.results.measured import measured_section
from lowmem.results.page import Cards, Drawing, Figures, Lines, Page, Section, Table, write_page
from lowmem.results.plots import run_panels
from lowmem.results.profile_section import profile_section
from lowmem.results.run_profile import RunProfile, read_run_profile
from lowmem.sizes import format_size
from lowmem.training.evaluate import Evaluation, read_evaluation

EPOCH_HEADS = ("epoch", "train loss", "val loss", "accuracy", "precision", "recall", "F1", "lr", "s", "waiting s", "images/s", "peak")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """What a run folder holds; None or empty for what the run has not written yet."""

    name: str
    history: list[EpochRow]
    evaluation: Evaluation | None
    plan: Plan | None
    machine: dict[str, Any] | None
    recipe_text: str
    profile: RunProfile | None = None


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder; parts that the run has not made yet are left out."""
    return write_page(run_page(read_run(run_folder)), run_folder / "report.html")


def read_run(folder: Path) -> RunResult:
    def found(name: str, read: Any) -> Any:
        return read(folder / name) if (folder / name).is_file() else None

    return RunResult(
        name=folder.resolve().name,
        history=found("epochs.csv", read_history) or [],
        evaluation=found("evaluation.json", read_evaluation),
        plan=found("plan.json", load_plan),
        machine=found("machine.json", lambda path: json.loads(path.read_text(encoding="utf-8"))),
        recipe_text=found("recipe.toml", lambda path: path.read_text(encoding="utf-8")) or "",
        profile=found("profile.json", read_run_profile),
    )


def run_page(run: RunResult) -> Page:
    return Page(
        title=run.name,
        lead=_lead(run),
        sections=(
            _scores(run.evaluation),
            _figures(run),
            _cost(run),
            profile_section(run.profile),
            Section("The plan in words", Lines(plan_lines(run.plan))) if run.plan else Section("The plan in words"),
            _epochs(run.history),
            measured_section(run.machine, _counts(run)),
            Section("Recipe", Lines(run.recipe_text.splitlines(), folded="every field")) if run.recipe_text else Section("Recipe"),
        ),
    )


def _lead(run: RunResult) -> str:
    if not run.history:
        return "No epoch is finished yet."
    best = _best(run.history)
    return (
        f"{len(run.history)} epoch{'s' if len(run.history) > 1 else ''}; the classifier is that of epoch {best.epoch}, "
        f"right about {best.val_accuracy:.1%} of the validation images."
    )


def _scores(found: Evaluation | None) -> Section:
    if found is None:
        return Section("Scores")
    facts = (
        ("accuracy", found.accuracy), ("macro F1", found.f1), ("macro precision", found.precision),
        ("macro recall", found.recall), ("validation loss", found.loss),
    )  # fmt: skip
    return Section("Scores of the best epoch", Cards([(name, f"{value:.4f}") for name, value in facts]))


def _figures(run: RunResult) -> Section:
    if not run.history:
        return Section("Figures")
    budget = run.plan.budget.total_bytes if run.plan and run.plan.budget else None
    predicted = run.plan.prediction.peak.total if run.plan and run.plan.prediction else None
    panels = list(run_panels(run.history, run.evaluation, budget, predicted))
    small = [Drawing.of(each.figure, each.caption) for each in panels if not each.wide]
    large = [Drawing.of(each.figure, each.caption) for each in panels if each.wide]
    return Section("Figures", Figures(*small), *([Figures(*large, wide=True)] if large else []))


def _cost(run: RunResult) -> Section:
    if not run.history:
        return Section("Cost")
    num, train_s = len(run.history), sum(row.train_s for row in run.history)
    waiting = sum(row.wait_data_s for row in run.history) / max(train_s, 1e-9)
    facts = [
        ("seconds per epoch", f"{sum(row.seconds for row in run.history) / num:.1f}"),
        ("images/s in training", f"{sum(row.images_per_s for row in run.history) / num:.0f}"),
        ("of training spent waiting for images", f"{waiting:.1%}"),
        ("peak memory on the device", format_size(max(row.peak_bytes for row in run.history))),
    ]
    return Section("Cost", Cards(facts))


def _epochs(history: list[EpochRow]) -> Section:
    if not history:
        return Section("Epochs")
    rows = [
        (
            str(row.epoch), f"{row.train_loss:.4f}", f"{row.val_loss:.4f}", f"{row.val_accuracy:.4f}", f"{row.val_precision:.4f}",
            f"{row.val_recall:.4f}", f"{row.val_f1:.4f}", f"{row.lr:.3g}", f"{row.seconds:.1f}", f"{row.wait_data_s:.2f}",
            f"{row.images_per_s:.0f}", format_size(row.peak_bytes),
        )
        for row in history
    ]  # fmt: skip
    return Section("Epochs", Table(EPOCH_HEADS, rows, bold=(history.index(_best(history)),), left=()))


def _counts(run: RunResult) -> list[str]:
    if not run.history:
        return []
    images = f"; scores from one pass over {run.evaluation.num_images} validation images" if run.evaluation else ""
    return [f"times and memory of {len(run.history)} epochs of one run, by the run itself{images}"]


def _best(history: list[EpochRow]) -> EpochRow:
    return max(history, key=lambda row: (row.val_accuracy, -row.val_loss))
