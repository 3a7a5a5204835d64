"""One self-contained HTML page about a run: no network, no script, light and dark, wide and narrow."""

import html
import json
import re
from pathlib import Path

from lowmem.planning.explain import plan_lines
from lowmem.planning.plan import load_plan
from lowmem.results.history import EpochRow, read_history
from lowmem.sizes import format_size
from lowmem.training.evaluate import Evaluation, read_evaluation

FIGURES = (
    ("curves", "Loss and accuracy"),
    ("confusion", "Confusion matrix"),
    ("resources", "Time and memory"),
    ("learning_rate", "Learning rate"),
)
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d5dae0; --soft: #f4f6f8; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --paper: #14171a; --line: #3a4047; --soft: #1e2328; --accent: #6bb8e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; } .card { background: var(--soft); border-radius: .5rem; padding: .6rem 1rem; min-width: 8rem; }
.card b { display: block; font-size: 1.35rem; color: var(--accent); } .card span { font-size: .85rem; }
figure { margin: 1rem 0; background: #ffffff; border-radius: .5rem; padding: .5rem; overflow-x: auto; } figure svg { display: block; width: 100%; min-width: 34rem; height: auto; max-width: 60rem; margin: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%; } th, td { text-align: right; padding: .25rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.best td { font-weight: 700; color: var(--accent); } pre { background: var(--soft); border-radius: .5rem; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; line-height: 1.45; }
"""


def write_report(run_folder: Path) -> Path:
    """Write report.html into a run folder; parts that the run has not made yet are left out."""
    history = read_history(run_folder / "epochs.csv") if (run_folder / "epochs.csv").is_file() else []
    evaluation = read_evaluation(run_folder / "evaluation.json") if (run_folder / "evaluation.json").is_file() else None
    sections = [
        f"<h1>{html.escape(run_folder.resolve().name)}</h1>",
        _cards(history, evaluation),
        _figures(run_folder / "figures"),
        _plan(run_folder / "plan.json"),
        _epochs(history),
        _machine(run_folder / "machine.json"),
        _preformatted("Recipe", run_folder / "recipe.toml"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>lowmem: {html.escape(run_folder.resolve().name)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>'
        f"{''.join(sections)}</body></html>\n"
    )
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _cards(history: list[EpochRow], evaluation: Evaluation | None) -> str:
    facts: list[tuple[str, str]] = []
    if evaluation is not None:
        facts += [
            ("accuracy", f"{evaluation.accuracy:.4f}"),
            ("macro F1", f"{evaluation.f1:.4f}"),
            ("macro precision", f"{evaluation.precision:.4f}"),
            ("macro recall", f"{evaluation.recall:.4f}"),
            ("validation loss", f"{evaluation.loss:.4f}"),
        ]
    if history:
        facts += [
            ("epochs", str(len(history))),
            ("seconds per epoch", f"{sum(row.seconds for row in history) / len(history):.1f}"),
            ("peak memory", format_size(max(row.peak_bytes for row in history))),
        ]
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>' for name, value in facts
    )
    return (
        f'<p>Best epoch on the validation images:</p><div class="cards">{cards}</div>'
        if cards
        else "<p>No epoch is finished yet.</p>"
    )


def _figures(folder: Path) -> str:
    parts = []
    for name, title in FIGURES:
        path = folder / f"{name}.svg"
        if path.is_file():
            parts.append(
                f'<h2>{title}</h2><figure role="img" aria-label="{title}">{_inline_svg(path.read_text(encoding="utf-8"), name)}</figure>'
            )
    return "".join(parts)


def _inline_svg(text: str, name: str) -> str:
    """The drawing alone, with identifiers that no other drawing on the page has."""
    drawing = text[text.index("<svg") :]
    drawing = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', drawing)
    drawing = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", drawing)
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"',
        r"<svg \1",
        re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", drawing, count=1),
        count=1,
    )


def _plan(path: Path) -> str:
    if not path.is_file():
        return ""
    return f"<h2>Plan</h2><pre>{html.escape(chr(10).join(plan_lines(load_plan(path))))}</pre>"


def _epochs(history: list[EpochRow]) -> str:
    if not history:
        return ""
    best = max(history, key=lambda row: (row.val_accuracy, -row.val_loss)).epoch
    heads = (
        "epoch",
        "train loss",
        "val loss",
        "accuracy",
        "precision",
        "recall",
        "F1",
        "lr",
        "s",
        "waiting s",
        "images/s",
        "peak",
    )
    rows = "".join(
        f"<tr{' class=best' if row.epoch == best else ''}><td>{row.epoch}<td>{row.train_loss:.4f}<td>{row.val_loss:.4f}<td>{row.val_accuracy:.4f}"
        f"<td>{row.val_precision:.4f}<td>{row.val_recall:.4f}<td>{row.val_f1:.4f}<td>{row.lr:.3g}<td>{row.seconds:.1f}<td>{row.wait_data_s:.2f}"
        f"<td>{row.images_per_s:.0f}<td>{format_size(row.peak_bytes)}</tr>"
        for row in history
    )
    return f'<h2>Epochs</h2><div class="scroll"><table><tr>{"".join(f"<th>{head}" for head in heads)}</tr>{rows}</table></div>'


def _machine(path: Path) -> str:
    if not path.is_file():
        return ""
    facts = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {format_size(facts['ram_bytes'])} RAM",
        facts["system"],
        f"Python {facts['python']}",
    ]
    lines += [f"{card['name']}, {format_size(card['total_bytes'])}, driver {card['driver']}" for card in facts["cards"]]
    lines.append(", ".join(f"{name} {version}" for name, version in facts["packages"].items()))
    return f"<h2>Machine</h2><pre>{html.escape(chr(10).join(lines))}</pre>"


def _preformatted(title: str, path: Path) -> str:
    return f"<h2>{title}</h2><pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>" if path.is_file() else ""
