"""Training: new runs, and runs that go on."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from lowmem.cli.app import app
from lowmem.cli.options import (
    Allow,
    CacheBytes,
    CacheFolder,
    CheckpointEvery,
    Data,
    Device,
    Ram,
    RecipeName,
    RunArgument,
    Set,
    Vram,
    Weights,
    overrides,
)


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
    profile: Annotated[
        Optional[Path],
        typer.Option("--profile", help="Follow what lowmem profile chose, its budget included: its folder."),
    ] = None,
    allow: Allow = "rounding",
    checkpoint_every: CheckpointEvery = "10m",
    loader: Annotated[
        str, typer.Option("--loader", help="Who loads images: auto, inline, threads or processes.")
    ] = "auto",
    workers: Annotated[
        Optional[int], typer.Option("--workers", help="How many; by default as many as it takes.")
    ] = None,
    layouts: Annotated[
        str,
        typer.Option("--layouts", help="measured: each block in the memory layout that is fastest here (rounding)."),
    ] = "default",
    compile_: Annotated[
        str,
        typer.Option("--compile", help="measured: torch.compile and CUDA graphs, taken where faster here (rounding)."),
    ] = "none",
    cache: CacheFolder = None,
    cache_bytes: CacheBytes = None,
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
        overrides=overrides(set_, weights),
        plan_file=plan,
        profile=profile,
        allow=allow,
        checkpoint_every=checkpoint_every,
        loader=loader,
        workers=workers,
        layouts=layouts,
        compile=compile_,
        cache=cache,
        cache_bytes=cache_bytes,
    )
    raise typer.Exit(train_new_run(request))


@app.command()
def resume(
    run: RunArgument,
    vram: Annotated[Optional[str], typer.Option("--vram", help="Continue under a plan for this budget.")] = None,
    ram: Ram = None,
    device: Annotated[
        Optional[str], typer.Option("--device", help="Continue on another device: cpu, cuda or cuda:N.")
    ] = None,
    allow: Annotated[
        Optional[str], typer.Option("--allow", help="How far a new plan may go: bitwise, rounding or statistical.")
    ] = None,
    data: Data = None,
    set_: Set = None,
    checkpoint_every: CheckpointEvery = "10m",
    cache: CacheFolder = None,
    cache_bytes: CacheBytes = None,
) -> None:
    """Continue a run that was stopped, killed or has crashed, to the same classifier."""
    from lowmem.training.resume import ResumeRequest, resume_run

    request = ResumeRequest(
        run=run,
        vram=vram,
        ram=ram,
        device=device,
        allow=allow,
        data=data,
        overrides=tuple(set_ or ()),
        checkpoint_every=checkpoint_every,
        cache=cache,
        cache_bytes=cache_bytes,
    )
    raise typer.Exit(resume_run(request))


@app.command()
def recipes() -> None:
    """List the recipes that ship with lowmem."""
    from lowmem.recipe import recipe_names, recipe_summary

    names = recipe_names()
    for name in names:
        print(f"{name:<{max(map(len, names))}}  {recipe_summary(name)}")
