"""Plans: what a budget costs, and the proof that it changes nothing."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.cli.app import EXIT_DIFFERS, app
from lowmem.cli.options import Allow, Data, Device, Ram, RecipeName, Set, Vram


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
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the network's blocks on the device, where the budget leaves a choice.")
    ] = False,
    out: Annotated[
        Optional[Path], typer.Option("--out", help="Save the plan to this file, or the frontier to this folder.")
    ] = None,
) -> None:
    """Show how a recipe would be trained in a budget; no GPU is needed."""
    from lowmem.budgeting import PlanRequest, show_frontier, show_plan

    request = PlanRequest(recipe, vram, ram, device, data, tuple(set_ or ()), allow, classes, images, measure)
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
