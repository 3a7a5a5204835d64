"""The commands: each parses its options and calls one function of the engine."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.errors import LowmemError

EXIT_ERROR, EXIT_STOPPED, EXIT_DIFFERS = 2, 130, 3

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train image classifiers in the memory you have, and get the classifier that a big card would give.",
)
DEBUG = {"on": False}

RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or a TOML file.")]
Data = Annotated[
    Optional[Path],
    typer.Option(
        "--data", help="Folder with train/ and val/, or one folder of class folders. Without it: the embedded images."
    ),
]
Vram = Annotated[str, typer.Option("--vram", help="Memory that training may use on the device, e.g. 8G.")]
Ram = Annotated[Optional[str], typer.Option("--ram", help="Host memory that loading and offloading may use, e.g. 16G.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Set = Annotated[
    Optional[list[str]],
    typer.Option("--set", help="Override a field of the recipe: --set optimizer.lr=1e-4. Repeatable."),
]
Weights = Annotated[Optional[Path], typer.Option("--weights", help="Initial weights: a safetensors or .pth file.")]
Allow = Annotated[
    str, typer.Option("--allow", help="How far a plan may go: bitwise, rounding or statistical (another classifier).")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    DEBUG["on"] = debug


@app.command()
def train(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    vram: Vram = "8G",
    ram: Ram = None,
    device: Device = "auto",
    out: Annotated[Optional[Path], typer.Option("--out", help="Run folder. Default: runs/RECIPE-DATE-TIME.")] = None,
    set_: Set = None,
    weights: Weights = None,
    plan: Annotated[Optional[Path], typer.Option("--plan", help="Follow this plan.json instead of planning.")] = None,
    allow: Allow = "rounding",
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", help="Besides each epoch's end: 10m, 600s or 500-steps.")
    ] = "10m",
) -> None:
    """Train a recipe on your images within a memory budget. Ctrl-C stops after the running step, with a checkpoint: exit code 130."""
    from lowmem.training.start import TrainRequest, train_new_run

    request = TrainRequest(
        recipe=recipe,
        data=data,
        vram=vram,
        ram=ram,
        device=device,
        out=out,
        overrides=_overrides(set_, weights),
        plan_file=plan,
        allow=allow,
        checkpoint_every=checkpoint_every,
    )
    raise typer.Exit(train_new_run(request))


@app.command()
def plan(
    recipe: RecipeName = "quickstart",
    data: Data = None,
    vram: Vram = "8G",
    ram: Ram = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda:N, or a card by name: 'RTX 4060 laptop', T4, H100, ...")
    ] = "auto",
    set_: Set = None,
    allow: Allow = "rounding",
    classes: Annotated[
        Optional[int],
        typer.Option("--classes", min=2, help="Number of classes, where there is no --data. Default: 100."),
    ] = None,
    images: Annotated[
        Optional[int],
        typer.Option("--images", min=1, help="Training images, where there is no --data. Default: 20700."),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Time and memory over budgets, as a table (and with --out as a figure).")
    ] = False,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Save the plan to this file, or the frontier to this folder.")
    ] = None,
) -> None:
    """Show how a recipe would be trained in a budget; no GPU is needed."""
    from lowmem.budgeting import PlanRequest, show_frontier, show_plan

    request = PlanRequest(recipe, vram, ram, device, data, tuple(set_ or ()), allow, classes, images)
    (show_frontier if frontier else show_plan)(request, out, Console())


@app.command()
def verify(
    recipe: RecipeName = "quickstart",
    vram: Vram = "8G",
    device: Device = "auto",
    set_: Set = None,
    allow: Allow = "rounding",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to compare.")] = 3,
    classes: Annotated[int, typer.Option("--classes", min=2, help="Number of classes.")] = 10,
    plan: Annotated[Optional[Path], typer.Option("--plan", help="Verify this plan.json instead of planning.")] = None,
) -> None:
    """Prove that the plan for a budget changes nothing: train it beside the unconstrained run and compare."""
    from lowmem.budgeting import verify_plan

    holds = verify_plan(recipe, tuple(set_ or ()), vram, device, allow, steps, classes, plan, Console())
    raise typer.Exit(0 if holds else EXIT_DIFFERS)


@app.command()
def resume(
    run: RunArgument,
    vram: Annotated[Optional[str], typer.Option("--vram", help="Continue under a plan for this budget.")] = None,
    data: Data = None,
    set_: Set = None,
    checkpoint_every: Annotated[
        str, typer.Option("--checkpoint-every", help="Besides each epoch's end: 10m, 600s or 500-steps.")
    ] = "10m",
) -> None:
    """Continue a run that was stopped, killed or has crashed, to the same classifier."""
    from lowmem.training.resume import resume_run

    raise typer.Exit(
        resume_run(run, vram=vram, data=data, overrides=tuple(set_ or ()), checkpoint_every=checkpoint_every)
    )


@app.command()
def predict(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... IMAGES",
            help="Run or classifier folders, then a folder of images or an image.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")] = Path("predictions.csv"),
    top: Annotated[int, typer.Option("--top", min=1, help="Labels per image.")] = 1,
    vram: Vram = "8G",
    device: Device = "auto",
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    px: Annotated[
        Optional[int], typer.Option("--px", min=16, help="Image size. Default: the classifier's test size.")
    ] = None,
) -> None:
    """Label images; several runs average their probabilities."""
    from lowmem.inference import predict_to_csv

    predict_to_csv(runs, out, top=top, vram=vram, device=device, flip=flip, px=px, console=Console())


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of class folders.", show_default=False)],
    vram: Vram = "8G",
    device: Device = "auto",
    px: Annotated[Optional[int], typer.Option("--px", help="Image size. Default: the classifier's test size.")] = None,
) -> None:
    """Accuracy, macro precision, recall, F1, loss and the confusion matrix on labelled images."""
    from lowmem.inference import evaluate_folder

    evaluate_folder(run, data, vram=vram, device=device, px=px, console=Console())


@app.command()
def recipes() -> None:
    """List the recipes that ship with lowmem."""
    from lowmem.recipe import load_recipe, recipe_names

    for name in recipe_names():
        found = load_recipe(name)
        print(f"{name:<32} {found.model.name}, {found.data.train_px} px, batch {found.batch.size}")


def main() -> None:
    """Entry point: users meet LowmemError in a few lines; `--debug` shows the traceback."""
    # OpenMP threads that sleep instead of spinning leave the cores to the loader. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    try:
        app()
    except LowmemError as error:
        if DEBUG["on"]:
            raise
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        Console(stderr=True).print("Stopped.")
        sys.exit(EXIT_STOPPED)


def _overrides(set_: list[str] | None, weights: Path | None) -> tuple[str, ...]:
    extra = () if weights is None else (f'model.weights="file:{weights.as_posix()}"',)
    return (*(set_ or ()), *extra)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
