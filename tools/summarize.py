"""A folder of runs as one table, with the columns in which the experiment kept its own.

    python tools/summarize.py runs/
    python tools/summarize.py runs/ --csv runs.csv --markdown runs.md --sort score

Every folder below it that holds a recipe.toml is a run. Unfinished ones are told apart by their status; of those that cannot be read, the
name and the reason are listed below the table. `score` is the validation accuracy of the best epoch, `epochs` are best / done of planned,
`s/epoch` the median over the epochs, `peak` the highest that was measured.
"""

import argparse
import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowmem.errors import LowmemError
from lowmem.recipe import Recipe, load_recipe
from lowmem.results.history import EpochRow, read_history
from lowmem.sizes import format_size
from lowmem.training.evaluate import read_evaluation

COLUMNS = (
    "run",
    "model",
    "epochs",
    "dropout",
    "loss",
    "optimizer",
    "augmentation",
    "lr and decay",
    "patience",
    "train px",
    "test px",
    "batch",
    "warm-up",
    "mixup",
    "score",
    "peak",
    "s/epoch",
    "status",
)
NUMBERS = {"dropout", "patience", "train px", "test px", "batch", "warm-up", "score", "peak", "s/epoch"}
AUGMENTATIONS = (
    ("blur_prob", "blur"),
    ("sharpen_prob", "sharpen"),
    ("brightness", "jitter"),
    ("hue", "hue"),
    ("grey_prob", "grey"),
    ("flip_prob", "flip"),
)
Row = dict[str, str]


@dataclass(frozen=True)
class Summary:
    """Rows of the runs that can be read, and the others with their reasons."""

    rows: list[Row]
    broken: list[tuple[str, str]]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--csv", type=Path, help="also write the table here")
    options.add_argument("--markdown", type=Path, help="also write the table here")
    options.add_argument("--sort", choices=("run", "model", "score"), default="run")
    chosen = options.parse_args()
    console = Console(highlight=False)
    try:
        summary = summarize(chosen.folder, chosen.sort)
        for path, text in ((chosen.csv, as_csv(summary)), (chosen.markdown, as_markdown(summary))):
            if path is not None:
                path.write_text(text, encoding="utf-8", newline="")
    except (LowmemError, OSError) as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        return 2
    print_summary(summary, console)
    return 0


def summarize(folder: Path, sort: str = "run") -> Summary:
    """The runs below a folder; raises LowmemError where there are none."""
    if not folder.is_dir():
        raise LowmemError(f"There is no folder {folder}. Give the one that holds the runs, as in runs/.")
    rows, broken = [], []
    for run in run_folders(folder):
        name = run.relative_to(folder).as_posix() if run != folder else run.name
        try:
            rows.append(row_of(run, name))
        except (LowmemError, ValidationError, ValueError, KeyError, TypeError, OSError) as error:
            broken.append((name, str(error).strip().splitlines()[0]))
    if not rows and not broken:
        raise LowmemError(f"{folder} holds no run: none of its folders has a recipe.toml or an events.jsonl.")
    return Summary(sorted(rows, key=lambda row: _key(row, sort)), broken)


def run_folders(folder: Path) -> list[Path]:
    """Folders with a run's recipe or log, by name; nothing inside a run is searched."""
    found = {path.parent for name in ("recipe.toml", "events.jsonl") for path in folder.rglob(name)}
    return sorted(path for path in found if not any(parent in found for parent in path.parents))


def row_of(run: Path, name: str) -> Row:
    """One run; raises what its damaged files provoke."""
    if not (run / "recipe.toml").is_file():
        raise LowmemError("has no recipe.toml: it ended before its first step")
    recipe = load_recipe(str(run / "recipe.toml"))
    history = read_history(run / "epochs.csv") if (run / "epochs.csv").is_file() else []
    return {"run": name} | _recipe_cells(recipe) | _measured_cells(run, recipe, history)


def as_csv(summary: Summary) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(summary.rows)
    writer.writerows({"run": name, "status": f"broken: {reason}"} for name, reason in summary.broken)
    return text.getvalue()


def as_markdown(summary: Summary) -> str:
    lines = [_line(COLUMNS), _line("--:" if name in NUMBERS else "---" for name in COLUMNS)]
    lines += [_line(row[name].replace("|", "\\|") for name in COLUMNS) for row in summary.rows]
    lines += ["", *(f"- {name} could not be read: {reason}" for name, reason in summary.broken)]
    return "\n".join(lines).rstrip() + "\n"


def print_summary(summary: Summary, console: Console) -> None:
    """As wide as the terminal allows: columns in which all runs agree are told once, above."""
    same = [name for name in COLUMNS[1:] if len(summary.rows) > 1 and len({row[name] for row in summary.rows}) == 1]
    if same:
        console.print("All: " + "; ".join(f"{name} {summary.rows[0][name]}" for name in same), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [name for name in COLUMNS if name not in same]
    for name in shown:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in summary.rows:
        table.add_row(*(row[name] for name in shown))
    if summary.rows:
        console.print(table)
    for name, reason in summary.broken:
        console.print(f"[yellow]could not be read:[/] {name}: {reason}", soft_wrap=True)


def _recipe_cells(recipe: Recipe) -> Row:
    schedule, mixup = recipe.schedule, recipe.mixup
    decay = "cosine" if schedule.kind == "cosine" else f"x{schedule.decay_factor:g}"
    resets = "".join(f", {reset.lr:g} from epoch {reset.epoch}" for reset in schedule.resets)
    return {
        "model": recipe.model.name + "".join(f" {name}={value}" for name, value in recipe.model.options.items()),
        "dropout": f"{recipe.model.dropout:g}",
        "loss": _loss(recipe),
        "optimizer": _optimizer(recipe),
        "augmentation": augmentation(recipe),
        "lr and decay": f"{recipe.optimizer.lr:g} {decay}{resets}",
        "patience": "-" if schedule.kind == "cosine" else str(schedule.patience),
        "train px": str(recipe.data.train_px),
        "test px": str(recipe.data.test_px),
        "batch": str(recipe.batch.size),
        "warm-up": str(schedule.warmup_epochs),
        "mixup": f"{mixup.prob:g}/{mixup.alpha:g}" if mixup.prob else "none",
    }


def _measured_cells(run: Path, recipe: Recipe, history: list[EpochRow]) -> Row:
    best = max(history, key=lambda row: (row.val_accuracy, -row.val_loss), default=None)
    score = read_evaluation(run / "evaluation.json").accuracy if best else None
    return {
        "epochs": f"{best.epoch if best else '-'}/{len(history)} of {recipe.schedule.epochs}",
        "score": "-" if score is None else f"{score:.4f}",
        "peak": format_size(max(row.peak_bytes for row in history)) if history else "-",
        "s/epoch": f"{median(row.seconds for row in history):.1f}" if history else "-",
        "status": status(run),
    }


def status(run: Path) -> str:
    """`finished`, or `unfinished` where it is running, was stopped or was killed."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line)["event"] for line in lines if line.endswith("}")]  # a kill may cut the last line off
    return "finished" if events and events[-1] == "finished" else "unfinished"


def augmentation(recipe: Recipe) -> str:
    """The operations that are switched on, in words."""
    augment = recipe.augment
    crops = ["crop"] if augment.crop_scale != (1.0, 1.0) else []
    found = crops + [word for name, word in AUGMENTATIONS if getattr(augment, name)]
    return " ".join(found) or "none"


def _loss(recipe: Recipe) -> str:
    loss = recipe.loss
    weights = "" if loss.class_weights == "none" else f", {loss.class_weights}"
    smoothing = f", smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
    return f"CE{weights}{smoothing}{', by images' if loss.divide_by == 'images' else ''}"


def _optimizer(recipe: Recipe) -> str:
    optimizer, ema = recipe.optimizer, recipe.ema.decay
    layers = f", layers {optimizer.layer_decay:g}" if optimizer.layer_decay else ""
    return f"{optimizer.name}, wd {optimizer.weight_decay:g}{layers}{f', EMA {ema:g}' if ema is not None else ''}"


def _key(row: Row, sort: str) -> tuple:
    if sort == "score":
        return (-float(row["score"]) if row["score"] != "-" else 1.0, row["run"])
    return (row[sort], row["run"])


def _line(cells: object) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
