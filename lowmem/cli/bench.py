"""Benches: what devices and budgets cost, and how devices compare."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from lowmem.cli.app import app
from lowmem.cli.options import Set

bench_app = typer.Typer(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    recipe: Annotated[
        Optional[str],
        typer.Option("--recipe", help="Default: seresnextaa101d_32x8d on a card, quickstart on a CPU."),
    ] = None,
    budgets: Annotated[
        Optional[str],
        typer.Option(
            "--budgets", help="Sizes such as 8G,4G,2G. Default: 24G to 2G on a card; shares of the need on a CPU."
        ),
    ] = None,
    devices: Annotated[str, typer.Option("--devices", help="all, or a list such as cuda:0,cpu.")] = "all",
    data: Annotated[
        str, typer.Option("--data", help="synthetic, embedded (the pictures that come along), or an image folder.")
    ] = "synthetic",
    images: Annotated[
        Optional[int],
        typer.Option(
            "--images", min=1, help="Images of the epoch that is spoken of. Default: those of --data, or 20700."
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.0, help="Stop adding rounds after this time; every budget gets one.")
    ] = 10.0,
    set_: Set = None,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", help="FILE.json; the report goes beside it. Default: bench-HOST-TIME.json."),
    ] = None,
) -> None:
    """Measure step and epoch time, memory and energy in each budget on each device. Ctrl-C keeps what there is."""
    if context.invoked_subcommand is not None:
        return
    from lowmem.benchmarking.command import BenchRequest, run_bench

    request = BenchRequest(recipe, budgets, devices, data, images, minutes, tuple(set_ or ()), out)
    raise typer.Exit(run_bench(request, Console()))


@bench_app.command()
def compare(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of lowmem bench.", show_default=False)],
    images: Annotated[
        Optional[int], typer.Option("--images", min=1, help="Images of the epoch. Default: those of the first file.")
    ] = None,
    devices: Annotated[
        Optional[str],
        typer.Option(
            "--predict", help="Cards to predict, as in 'T4,H100', or none. Default: every known card that was not run."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The report.")] = Path("bench-compare.html"),
) -> None:
    """Set benches of several computers side by side; cards that nobody ran are predicted, and marked so."""
    from lowmem.benchmarking.command import run_compare

    run_compare(files, images, devices, out, Console())
